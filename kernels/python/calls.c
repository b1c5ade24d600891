/* The short way of usual calls: forward and backward of the autograd Functions, without Python between torch and the
 * kernels of fastvae.h. A module in CPython's limited API, which reads tensors through DLPack's exchange API: it is
 * compiled without torch and serves all versions of both.
 *
 * Every function here stands for one in Python, its `self`, which computes the same, and which it calls wherever
 * something is not as it usually is: another backend, dtype, layout or device, a derivative of the gradients, an upstream
 * gradient that is no plain tensor. `fastvae/ops/short.py` puts them in place. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <math.h>
#include <string.h>

#include "fastvae.h"

/* DLPack (dmlc/dlpack, dlpack.h): DLTensor, and the part of DLPackExchangeAPI that is used. */
typedef struct {
    void *data;
    int32_t device_type, device_id; /* 1: CPU */
    int32_t ndim;
    uint8_t code, bits; /* 0: integer, 2: floating point */
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} View;
typedef struct {
    uint32_t major, minor;
    void *previous, *allocate, *export_managed, *import_managed;
    int (*view)(void *tensor, View *);
} Exchange;

enum { kMostBytes = 1 << 22 }; /* larger results are made in Python, which asks for huge pages */

/* What `configure` is given, for the life of the process; and the tables of `use`, NULL where native computes nothing. */
static const Exchange *exchange;
static PyTypeObject *tensor_type, *parameter_type;
static PyObject *settings, *empty_like, *get_num_threads, *exact_skip, *is_quiet, *settle;
static const fastvae_kernels *tables[2];

static PyObject *current_, *is_neg, *is_zerotensor, *new_empty, *nothing; /* names, and () */
static PyObject *to_save, *saved_tensors, *needs_input_grad, *materialize_grads, *non_differentiable, *reduction_;
static PyObject *n_samples_, *outputs_, *numbers_, *unpacked_;

/* Calls the function in Python instead. */
static PyObject *in_python(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    PyErr_Clear();
    PyObject *tuple = PyTuple_New(n), *result;
    if (!tuple) return NULL;
    for (Py_ssize_t i = 0; i < n; ++i) Py_INCREF(args[i]), PyTuple_SetItem(tuple, i, args[i]);
    result = PyObject_Call(self, tuple, NULL);
    Py_DECREF(tuple);
    return result;
}

/* Likewise for a backward, which is told of the saved tensors: they may be unpacked once only. */
static PyObject *backward_in_python(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *saved) {
    PyErr_Clear();
    const int failed = saved && PyObject_SetAttr(args[0], unpacked_, saved);
    Py_XDECREF(saved);
    return failed ? NULL : in_python(self, args, n);
}

static int is_true(PyObject *result) {
    const int truth = result ? PyObject_IsTrue(result) : 0;
    Py_XDECREF(result);
    return truth == 1;
}

/* Whether native computes on CPU tensors, as far as settings say. */
static int native_is_asked_for(void) {
    PyObject *current = PyObject_GetAttr(settings, current_);
    PyObject *backend = current ? PyTuple_GetItem(current, 0) : NULL; /* borrowed */
    const int is = backend && (backend == Py_None || !PyUnicode_CompareWithASCIIString(backend, "native"));
    Py_XDECREF(current);
    return is;
}

static char *data(const View *view) { return (char *)view->data + view->byte_offset; }

static int is_float(const View *view, int bits) {
    return view->device_type == 1 && view->code == 2 && view->bits == bits && view->lanes == 1;
}

/* A tensor of a plain type, with memory. */
static int view_of(PyObject *x, View *view) {
    return (Py_TYPE(x) == tensor_type || Py_TYPE(x) == parameter_type) && !exchange->view(x, view) && view->data;
}

/* [n, D] with contiguous rows */
static int are_rows(const View *x, int bits) {
    return is_float(x, bits) && x->ndim == 2 && (x->strides[1] == 1 || x->shape[1] == 1) &&
           (x->strides[0] >= x->shape[1] || x->shape[0] == 1) &&
           x->shape[0] <= kMostBytes / 8 / (x->shape[1] ? x->shape[1] : 1);
}

static int is_dense(const View *x) {
    int64_t size = 1;
    for (int axis = x->ndim - 1; axis >= 0; size *= x->shape[axis--])
        if (x->shape[axis] != 1 && x->strides[axis] != size) return 0;
    return 1;
}

static int is_flagged(PyObject *x) { /* negated when it is read, or zeros without memory */
    return is_true(PyObject_CallMethodObjArgs(x, is_neg, NULL)) ||
           is_true(PyObject_CallMethodObjArgs(x, is_zerotensor, NULL)) || PyErr_Occurred();
}

/* are_usual(tensors...), of ops/short.py */
static PyObject *are_usual(PyObject *module, PyObject *const *args, Py_ssize_t n) {
    View first, other, *x = &first;
    (void)module;
    for (Py_ssize_t i = 0; i < n; ++i, x = &other) {
        if (!view_of(args[i], x) || x->ndim != 2 || x->code != 2 || (x->bits != 32 && x->bits != 64) || x->lanes != 1 ||
            x->shape[0] == 0 || x->shape[1] == 0 || x->shape[0] != first.shape[0] || x->shape[1] != first.shape[1] ||
            x->bits != first.bits || x->device_type != first.device_type || x->device_id != first.device_id ||
            is_flagged(args[i])) {
            PyErr_Clear();
            Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
}

/* The kernels for mu and logvar [n, D], viewed; NULL where they are not usual. */
static const fastvae_kernels *kernels_for(PyObject *mu_, View *mu, PyObject *logvar_, View *logvar) {
    if (!native_is_asked_for() || !view_of(mu_, mu) || !view_of(logvar_, logvar)) return NULL;
    if (!are_rows(mu, mu->bits) || !are_rows(logvar, mu->bits)) return NULL;
    if (mu->shape[0] != logvar->shape[0] || mu->shape[1] != logvar->shape[1]) return NULL;
    return mu->bits == 32 ? tables[0] : mu->bits == 64 ? tables[1] : NULL;
}

/* An upstream gradient, dense and of a size, as a pointer; NULL where there is none. Gives 0 where it is not usual. */
static int upstream(PyObject *g, int bits, int64_t size, const void **pointer) {
    View view;
    int64_t elements = 1;
    *pointer = NULL;
    if (g == Py_None) return 1;
    if (!view_of(g, &view) || !is_float(&view, bits) || !is_dense(&view)) return 0;
    for (int axis = 0; axis < view.ndim; ++axis) elements *= view.shape[axis];
    if (elements != size || is_flagged(g)) return 0;
    *pointer = data(&view);
    return 1;
}

/* A new tensor, and its memory: like x, or [n], or a number where n is -1. NULL with an exception where there is none. */
static PyObject *like(PyObject *x, void **memory) {
    View view;
    PyObject *made = PyObject_CallFunctionObjArgs(empty_like, x, NULL);
    if (made && exchange->view(made, &view)) Py_DECREF(made), made = NULL;
    if (made) *memory = data(&view);
    return made;
}
static PyObject *empty(PyObject *x, int64_t n, void **memory) {
    View view;
    PyObject *shape = n < 0 ? (Py_INCREF(nothing), nothing) : Py_BuildValue("(L)", (long long)n);
    PyObject *made = shape ? PyObject_CallMethodObjArgs(x, new_empty, shape, NULL) : NULL;
    Py_XDECREF(shape);
    if (made && exchange->view(made, &view)) Py_DECREF(made), made = NULL;
    if (made) *memory = data(&view);
    return made;
}

static int threads(void) {
    PyObject *number = PyObject_CallFunctionObjArgs(get_num_threads, NULL);
    const long n = number ? PyLong_AsLong(number) : 1;
    Py_XDECREF(number);
    return n < 1 ? 1 : (int)n;
}

/* Whether a call that has given this status is to be made again; otherwise there is an exception. */
static int again(int status) {
    PyObject *code = PyLong_FromLong(status), *result = code ? PyObject_CallFunctionObjArgs(settle, code, NULL) : NULL;
    Py_XDECREF(code);
    Py_XDECREF(result);
    return result != NULL;
}

/* Runs a kernel, other Python threads going on meanwhile; on failure goes to `failed`. */
#define RUN(call) \
    for (;;) { \
        PyThreadState *state = PyEval_SaveThread(); \
        const int status = (call); \
        PyEval_RestoreThread(state); \
        if (status == FASTVAE_OK) break; \
        if (!again(status)) goto failed; \
    }

static void drop(PyObject **tensors, int n) {
    for (int i = 0; i < n; ++i) Py_XDECREF(tensors[i]);
}

static int keep(PyObject *ctx, PyObject *name, PyObject *value) { /* takes the value over */
    const int failed = !value || PyObject_SetAttr(ctx, name, value);
    Py_XDECREF(value);
    return !failed;
}

/* ctx.needs_input_grad, for n inputs. */
static int wanted(PyObject *ctx, int n, int *want) {
    PyObject *needs = PyObject_GetAttr(ctx, needs_input_grad);
    for (int i = 0; i < n; ++i) want[i] = needs && PyTuple_GetItem(needs, i) == Py_True;
    Py_XDECREF(needs);
    return needs != NULL;
}

/* A tuple of n: the tensors, those that are NULL None, and None. Takes them over. */
static PyObject *tuple_of(PyObject **tensors, int n_tensors, int n) {
    PyObject *result = PyTuple_New(n);
    if (!result) return drop(tensors, n_tensors), NULL;
    for (int i = 0; i < n; ++i) {
        PyObject *x = i < n_tensors ? tensors[i] : NULL;
        if (!x) Py_INCREF(x = Py_None);
        PyTuple_SetItem(result, i, x);
    }
    return result;
}

/* The C code of a KL's reduction and its factor; 0 where it is not known. */
static int reduction_of(PyObject *name, int64_t B, int64_t D, int *code, double *scale) {
    *code = FASTVAE_SUM, *scale = 1;
    if (!PyUnicode_Check(name)) return 0;
    if (!PyUnicode_CompareWithASCIIString(name, "batchmean")) return *scale = 1.0 / (double)B, 1;
    if (!PyUnicode_CompareWithASCIIString(name, "sum")) return 1;
    if (!PyUnicode_CompareWithASCIIString(name, "mean")) return *scale = 1.0 / (double)(B * D), 1;
    if (!PyUnicode_CompareWithASCIIString(name, "sample")) return *code = FASTVAE_SAMPLE, 1;
    return 0;
}

/* kl_gauss(ctx, mu, logvar, None, None, reduction) */
static PyObject *kl_gauss(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    View mu, logvar;
    const fastvae_kernels *kernels;
    int code;
    double scale;
    void *out;
    if (n != 6 || args[3] != Py_None || args[4] != Py_None || !(kernels = kernels_for(args[1], &mu, args[2], &logvar)))
        return in_python(self, args, n);
    const int64_t B = mu.shape[0], D = mu.shape[1];
    if (!reduction_of(args[5], B, D, &code, &scale)) return in_python(self, args, n);
    Py_INCREF(args[5]);
    if (!keep(args[0], reduction_, args[5]) ||
        !keep(args[0], to_save, PyTuple_Pack(4, args[1], args[2], Py_None, Py_None)))
        return NULL;
    PyObject *kl = empty(args[1], code == FASTVAE_SAMPLE ? B : -1, &out);
    if (!kl) return NULL;
    const int t = threads();
    RUN(kernels->kl_gauss(data(&mu), mu.strides[0], data(&logvar), logvar.strides[0], NULL, 0, NULL, 0, B, D, code, scale,
                          out, t));
    return kl;
failed:
    Py_DECREF(kl);
    return NULL;
}

static PyObject *kl_gauss_backward(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    View mu, logvar;
    const fastvae_kernels *kernels;
    const void *grad;
    int code, want[4];
    double scale;
    PyObject *out[2] = {NULL, NULL}, *saved = NULL, *reduction = NULL;
    void *memory[2] = {NULL, NULL};
    if (n != 2 || !is_true(PyObject_CallFunctionObjArgs(is_quiet, NULL)) || !wanted(args[0], 4, want)) goto unusual;
    if (!(saved = PyObject_GetAttr(args[0], saved_tensors)) || !(reduction = PyObject_GetAttr(args[0], reduction_)))
        goto unusual;
    PyObject *const mu_ = PyTuple_GetItem(saved, 0), *const logvar_ = PyTuple_GetItem(saved, 1);
    if (PyTuple_GetItem(saved, 2) != Py_None || PyTuple_GetItem(saved, 3) != Py_None) goto unusual;
    if (!(kernels = kernels_for(mu_, &mu, logvar_, &logvar))) goto unusual;
    const int64_t B = mu.shape[0], D = mu.shape[1];
    if (!reduction_of(reduction, B, D, &code, &scale)) goto unusual;
    if (!upstream(args[1], mu.bits, code == FASTVAE_SAMPLE ? B : 1, &grad) || !grad) goto unusual;
    if ((want[0] && !(out[0] = like(mu_, memory))) || (want[1] && !(out[1] = like(logvar_, memory + 1)))) goto failed;
    const int t = threads();
    RUN(kernels->kl_gauss_backward(grad, code == FASTVAE_SAMPLE, 0, scale, data(&mu), mu.strides[0], data(&logvar),
                                   logvar.strides[0], NULL, 0, NULL, 0, B, D, memory[0], memory[1], NULL, NULL, t));
    Py_DECREF(saved), Py_DECREF(reduction);
    return tuple_of(out, 2, 5);
failed:
    drop(out, 2), Py_XDECREF(saved), Py_XDECREF(reduction);
    return NULL;
unusual:
    Py_XDECREF(reduction);
    return backward_in_python(self, args, n, saved);
}

/* sample_gauss(ctx, mu, logvar, seed, None, outputs, reduction) */
static PyObject *sample_gauss(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    View mu, logvar, seed;
    const fastvae_kernels *kernels;
    int code, count = 0;
    double scale;
    PyObject *out[4] = {NULL, NULL, NULL, NULL};
    void *memory[4] = {NULL, NULL, NULL, NULL};
    if (n != 7 || args[4] != Py_None || !PyTuple_Check(args[5]) || PyTuple_Size(args[5]) != 5 ||
        PyTuple_GetItem(args[5], 4) == Py_True ||
        !(kernels = kernels_for(args[1], &mu, args[2], &logvar)) || !view_of(args[3], &seed))
        return in_python(self, args, n);
    const int64_t B = mu.shape[0], D = mu.shape[1];
    if (!reduction_of(args[6], B, D, &code, &scale)) return in_python(self, args, n);
    Py_INCREF(args[4]), Py_INCREF(args[5]), Py_INCREF(args[6]), Py_INCREF(Py_False);
    if (!keep(args[0], n_samples_, args[4]) || !keep(args[0], outputs_, args[5]) ||
        !keep(args[0], reduction_, args[6]) || !keep(args[0], materialize_grads, Py_False) ||
        !keep(args[0], to_save, PyTuple_Pack(3, args[1], args[2], args[3])))
        return NULL;
    for (int i = 0; i < 4; ++i) {
        if (PyTuple_GetItem(args[5], i) != Py_True) continue;
        const int64_t size = i == 3 && code == FASTVAE_SUM ? -1 : B;
        if (!(out[i] = i == 0 ? like(args[1], memory) : empty(args[1], size, memory + i))) goto failed;
        ++count;
    }
    const int t = threads();
    RUN(kernels->sample_gauss(data(&mu), mu.strides[0], data(&logvar), logvar.strides[0],
                              (const uint64_t *)data(&seed), 1, B, D, code, scale, memory[0], memory[1], memory[2],
                              memory[3], NULL, t));
    PyObject *results = PyTuple_New(count);
    if (!results) goto failed;
    for (int i = 0, k = 0; i < 4; ++i)
        if (out[i]) PyTuple_SetItem(results, k++, out[i]);
    return results;
failed:
    drop(out, 4);
    return NULL;
}

static PyObject *sample_gauss_backward(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    View mu, logvar, seed;
    const fastvae_kernels *kernels;
    const void *grad[4] = {NULL, NULL, NULL, NULL};
    int code, want[2], k = 1;
    double scale;
    PyObject *out[2] = {NULL, NULL}, *saved = NULL, *reduction = NULL, *outputs = NULL, *samples = NULL;
    void *memory[2] = {NULL, NULL};
    if (!is_true(PyObject_CallFunctionObjArgs(is_quiet, NULL)) || !wanted(args[0], 2, want)) goto unusual;
    if (!(saved = PyObject_GetAttr(args[0], saved_tensors)) || !(reduction = PyObject_GetAttr(args[0], reduction_)) ||
        !(outputs = PyObject_GetAttr(args[0], outputs_)) || !(samples = PyObject_GetAttr(args[0], n_samples_)))
        goto unusual;
    PyObject *const mu_ = PyTuple_GetItem(saved, 0), *const logvar_ = PyTuple_GetItem(saved, 1);
    if (samples != Py_None || !(kernels = kernels_for(mu_, &mu, logvar_, &logvar)) ||
        !view_of(PyTuple_GetItem(saved, 2), &seed))
        goto unusual;
    const int64_t B = mu.shape[0], D = mu.shape[1];
    if (!reduction_of(reduction, B, D, &code, &scale)) goto unusual;
    for (int i = 0; i < 4; ++i) {
        if (PyTuple_GetItem(outputs, i) != Py_True) continue;
        const int64_t size = i == 0 ? B * D : i == 3 && code == FASTVAE_SUM ? 1 : B;
        if (k >= n || !upstream(args[k++], mu.bits, size, grad + i)) goto unusual;
    }
    if (want[0] && grad[0] && !grad[1] && !grad[2] && !grad[3]) /* that of z is that of mu */
        Py_INCREF(out[0] = args[1]);
    else if (want[0] && !(out[0] = like(mu_, memory)))
        goto failed;
    if (want[1] && !(out[1] = like(logvar_, memory + 1))) goto failed;
    const int t = memory[0] || memory[1] ? threads() : 0;
    if (t)
        RUN(kernels->sample_gauss_backward(grad[0], grad[1], grad[2], grad[3], code == FASTVAE_SAMPLE, scale, data(&mu),
                                           mu.strides[0], data(&logvar), logvar.strides[0],
                                           (const uint64_t *)data(&seed), NULL, 1, B, D, memory[0], memory[1], t));
    Py_DECREF(saved), Py_DECREF(reduction), Py_DECREF(outputs), Py_DECREF(samples);
    return tuple_of(out, 2, 6);
failed:
    drop(out, 2), Py_XDECREF(saved), Py_XDECREF(reduction), Py_XDECREF(outputs), Py_XDECREF(samples);
    return NULL;
unusual:
    Py_XDECREF(reduction), Py_XDECREF(outputs), Py_XDECREF(samples);
    return backward_in_python(self, args, n, saved);
}

/* The pair ops: (ctx, z, mu, logvar, then the fields of LogWeights). */
typedef struct {
    const fastvae_kernels *kernels;
    View z, mu, logvar, own_view;
    int64_t S, N, D;
    int bits, skip;
    double log_w_all, log_w_own, log_w_next;
    const int64_t *own;
} Pairs;

static double number_or(PyObject *x, double otherwise) { return x == Py_None ? otherwise : PyFloat_AsDouble(x); }

/* Of z, mu, logvar, log_w, own, and the numbers log_w_all, log_w_own, log_w_next; 0 where they are not usual. */
static int pairs_of(Pairs *p, PyObject *z, PyObject *mu, PyObject *logvar, PyObject *log_w, PyObject *own,
                    PyObject *log_w_all, PyObject *log_w_own, PyObject *log_w_next) {
    if (log_w != Py_None || !(p->kernels = kernels_for(mu, &p->mu, logvar, &p->logvar)) || !view_of(z, &p->z)) return 0;
    p->bits = p->mu.bits;
    if (!are_rows(&p->z, p->bits) || !is_dense(&p->z) || !is_dense(&p->mu) || !is_dense(&p->logvar)) return 0;
    p->S = p->z.shape[0], p->N = p->mu.shape[0], p->D = p->mu.shape[1];
    if (p->z.shape[1] != p->D) return 0;
    p->own = NULL;
    if (own != Py_None) {
        if (!view_of(own, &p->own_view) || p->own_view.device_type != 1 || p->own_view.code != 0 ||
            p->own_view.bits != 64 || !is_dense(&p->own_view))
            return 0;
        p->own = (const int64_t *)data(&p->own_view);
    }
    p->log_w_all = number_or(log_w_all, -log((double)p->N));
    p->log_w_own = number_or(log_w_own, NAN), p->log_w_next = number_or(log_w_next, NAN);
    PyObject *skip = PyObject_CallFunctionObjArgs(exact_skip, NULL);
    p->skip = is_true(skip);
    return !PyErr_Occurred();
}

#define PAIRS(p) data(&(p).z), data(&(p).mu), data(&(p).logvar), NULL, (p).log_w_all, (p).own, (p).log_w_own, \
                 (p).log_w_next, (p).S, (p).N, (p).D

static int pairs_of_forward(Pairs *p, PyObject *const *args, Py_ssize_t n) {
    return n == 9 && pairs_of(p, args[1], args[2], args[3], args[4], args[6], args[5], args[7], args[8]);
}

/* Saves what `save` of ops/pairs.py does. */
static int keep_pairs(PyObject *const *args, PyObject *const *results, int n) {
    PyObject *all = PyTuple_New(n + 5);
    for (int i = 0; all && i < n + 5; ++i) {
        PyObject *x = i < n ? results[i] : i < n + 4 ? args[1 + i - n] : args[6];
        Py_INCREF(x);
        PyTuple_SetItem(all, i, x);
    }
    return keep(args[0], to_save, all) && keep(args[0], numbers_, PyTuple_Pack(3, args[5], args[7], args[8]));
}

/* The saved pairs, after n results; `saved` is to be given back. */
static int pairs_of_backward(Pairs *p, PyObject *ctx, int n, PyObject **saved) {
    PyObject *numbers;
    *saved = NULL;
    if (!is_true(PyObject_CallFunctionObjArgs(is_quiet, NULL)) || !native_is_asked_for() ||
        !(numbers = PyObject_GetAttr(ctx, numbers_)))
        return 0;
    const int usual =
        (*saved = PyObject_GetAttr(ctx, saved_tensors)) &&
        pairs_of(p, PyTuple_GetItem(*saved, n), PyTuple_GetItem(*saved, n + 1), PyTuple_GetItem(*saved, n + 2),
                 PyTuple_GetItem(*saved, n + 3), PyTuple_GetItem(*saved, n + 4), PyTuple_GetItem(numbers, 0),
                 PyTuple_GetItem(numbers, 1), PyTuple_GetItem(numbers, 2));
    Py_DECREF(numbers);
    return usual;
}

/* New tensors for those of the gradients of the saved z, mu and logvar that are wanted. */
static int outputs_of(PyObject *ctx, PyObject *saved, int n, PyObject **out, void **memory) {
    int want[4];
    if (!wanted(ctx, 4, want)) return 0;
    for (int i = 0; i < 3; ++i)
        if (want[i] && !(out[i] = like(PyTuple_GetItem(saved, n + i), memory + i))) return 0;
    return 1;
}


static PyObject *agg_log_prob(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Pairs p;
    void *joint_;
    if (!pairs_of_forward(&p, args, n)) return in_python(self, args, n);
    PyObject *joint = empty(args[1], p.S, &joint_);
    if (!joint) return NULL;
    if (!keep_pairs(args, &joint, 1)) goto failed;
    const int t = threads();
    RUN(p.kernels->agg_log_prob(PAIRS(p), joint_, p.skip, t));
    return joint;
failed:
    Py_DECREF(joint);
    return NULL;
}

static PyObject *agg_log_prob_backward(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Pairs p;
    PyObject *out[3] = {NULL, NULL, NULL}, *saved = NULL;
    void *memory[3] = {NULL, NULL, NULL};
    const void *grad;
    if (n != 2 || !pairs_of_backward(&p, args[0], 1, &saved) || !upstream(args[1], p.bits, p.S, &grad) || !grad) {
        return backward_in_python(self, args, n, saved);
    }
    if (!outputs_of(args[0], saved, 1, out, memory)) goto failed;
    const int t = threads();
    RUN(p.kernels->agg_log_prob_backward(grad, PAIRS(p), NULL, memory[0], memory[1], memory[2], NULL, p.skip, t));
    Py_DECREF(saved);
    return tuple_of(out, 3, 8);
failed:
    Py_DECREF(saved), drop(out, 3);
    return NULL;
}

static PyObject *agg_entropy(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Pairs p;
    void *entropy_;
    if (!pairs_of_forward(&p, args, n)) return in_python(self, args, n);
    PyObject *entropy = empty(args[1], -1, &entropy_);
    if (!entropy) return NULL;
    if (!keep_pairs(args, NULL, 0)) goto failed;
    const int t = threads();
    RUN(p.kernels->agg_entropy(PAIRS(p), entropy_, p.skip, t));
    return entropy;
failed:
    Py_DECREF(entropy);
    return NULL;
}

static PyObject *agg_entropy_backward(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Pairs p;
    PyObject *out[3] = {NULL, NULL, NULL}, *saved = NULL;
    void *memory[3] = {NULL, NULL, NULL};
    const void *grad;
    if (n != 2 || !pairs_of_backward(&p, args[0], 0, &saved) || !upstream(args[1], p.bits, 1, &grad) || !grad) {
        return backward_in_python(self, args, n, saved);
    }
    if (!outputs_of(args[0], saved, 0, out, memory)) goto failed;
    const int t = threads();
    RUN(p.kernels->agg_entropy_backward(grad, PAIRS(p), memory[0], memory[1], memory[2], NULL, p.skip, t));
    Py_DECREF(saved);
    return tuple_of(out, 3, 8);
failed:
    Py_DECREF(saved), drop(out, 3);
    return NULL;
}

/* Results: mi, agg_kl, tc, dim_kl, prior_factorization, kl, entropy, saturation, joint, marginals. */
static PyObject *kl_decomposition(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Pairs p;
    PyObject *out[10] = {NULL};
    void *m[10] = {NULL};
    if (!pairs_of_forward(&p, args, n)) return in_python(self, args, n);
    for (int i = 0; i < 10; ++i) {
        const int64_t size = i == 3 ? p.D : i == 8 ? p.S : -1;
        if (!(out[i] = i == 9 ? like(args[1], m + i) : empty(args[1], size, m + i))) goto failed;
    }
    memset(m[4], 0, (size_t)p.bits / 8);
    Py_INCREF(Py_False);
    if (!keep_pairs(args, out + 8, 2) || !keep(args[0], materialize_grads, Py_False) ||
        !keep(args[0], non_differentiable, PyTuple_Pack(3, out[7], out[8], out[9])))
        goto failed;
    const int t = threads();
    RUN(p.kernels->kl_decomposition(PAIRS(p), m[0], m[1], m[2], m[3], m[5], m[6], m[7], m[8], m[9], t));
    return tuple_of(out, 10, 10);
failed:
    drop(out, 10);
    return NULL;
}

static PyObject *kl_decomposition_backward(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    Pairs p;
    PyObject *out[3] = {NULL, NULL, NULL}, *saved = NULL;
    void *memory[3] = {NULL, NULL, NULL};
    const void *g[7];
    View joint, marginals;
    int usual = n == 11 && pairs_of_backward(&p, args[0], 2, &saved) && view_of(PyTuple_GetItem(saved, 0), &joint) &&
                view_of(PyTuple_GetItem(saved, 1), &marginals) && is_dense(&joint) && is_dense(&marginals);
    for (int i = 0; usual && i < 7; ++i) usual = upstream(args[1 + i], p.bits, i == 3 ? p.D : 1, g + i);
    if (!usual) {
        return backward_in_python(self, args, n, saved);
    }
    if (!outputs_of(args[0], saved, 2, out, memory)) goto failed;
    const int t = threads();
    RUN(p.kernels->kl_decomposition_backward(g[0], g[1], g[2], g[3], g[5], g[6], data(&joint), data(&marginals), PAIRS(p),
                                             memory[0], memory[1], memory[2], NULL, t));
    Py_DECREF(saved);
    return tuple_of(out, 3, 8);
failed:
    Py_DECREF(saved), drop(out, 3);
    return NULL;
}

#define BOUND(name) {#name, (PyCFunction)(void *)name, METH_FASTCALL, NULL}
static PyMethodDef bound[] = {
    BOUND(kl_gauss),         BOUND(kl_gauss_backward),         BOUND(sample_gauss), BOUND(sample_gauss_backward),
    BOUND(agg_log_prob),     BOUND(agg_log_prob_backward),     BOUND(agg_entropy),  BOUND(agg_entropy_backward),
    BOUND(kl_decomposition), BOUND(kl_decomposition_backward),
};

/* bind(name, function): the one here that stands for the function in Python, or None. */
static PyObject *bind(PyObject *module, PyObject *const *args, Py_ssize_t n) {
    (void)module;
    if (n != 2 || !PyUnicode_Check(args[0])) return PyErr_SetString(PyExc_TypeError, "bind(name, function)"), NULL;
    for (size_t i = 0; i < sizeof bound / sizeof *bound; ++i)
        if (!PyUnicode_CompareWithASCIIString(args[0], bound[i].ml_name)) return PyCFunction_NewEx(bound + i, args[1], NULL);
    Py_RETURN_NONE;
}

/* use(address of the float32 table, of the float64 one); 0 for none. */
static PyObject *use(PyObject *module, PyObject *const *args, Py_ssize_t n) {
    (void)module;
    if (n != 2) return PyErr_SetString(PyExc_TypeError, "use(float32, float64)"), NULL;
    for (int i = 0; i < 2; ++i) tables[i] = (const fastvae_kernels *)PyLong_AsVoidPtr(args[i]);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

/* configure(capsule, Tensor, Parameter, settings, empty_like, get_num_threads, exact_skip, is_quiet, settle) */
static PyObject *configure(PyObject *module, PyObject *const *args, Py_ssize_t n) {
    (void)module;
    if (n != 9) return PyErr_SetString(PyExc_TypeError, "configure: 9 arguments"), NULL;
    exchange = (const Exchange *)PyCapsule_GetPointer(args[0], "dlpack_exchange_api");
    if (!exchange) return NULL;
    if (exchange->major != 1) return PyErr_SetString(PyExc_RuntimeError, "another version of DLPack"), NULL;
    for (int i = 0; i < 9; ++i) Py_INCREF(args[i]);
    tensor_type = (PyTypeObject *)args[1], parameter_type = (PyTypeObject *)args[2];
    settings = args[3], empty_like = args[4], get_num_threads = args[5];
    exact_skip = args[6], is_quiet = args[7], settle = args[8];
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"are_usual", (PyCFunction)(void *)are_usual, METH_FASTCALL, NULL},
    {"bind", (PyCFunction)(void *)bind, METH_FASTCALL, NULL},
    {"use", (PyCFunction)(void *)use, METH_FASTCALL, NULL},
    {"configure", (PyCFunction)(void *)configure, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

PyMODINIT_FUNC PyInit__calls(void) {
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_calls", NULL, -1, methods, NULL, NULL, NULL, NULL};
    const struct {
        PyObject **name;
        const char *text;
    } names[] = {
        {&current_, "current"}, {&is_neg, "is_neg"}, {&is_zerotensor, "_is_zerotensor"}, {&new_empty, "new_empty"},
        {&to_save, "to_save"}, {&saved_tensors, "saved_tensors"}, {&needs_input_grad, "needs_input_grad"},
        {&materialize_grads, "materialize_grads"}, {&non_differentiable, "non_differentiable"},
        {&reduction_, "reduction"}, {&n_samples_, "n_samples"}, {&outputs_, "outputs"}, {&numbers_, "numbers"},
        {&unpacked_, "unpacked"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
        if (!(*names[i].name = PyUnicode_InternFromString(names[i].text))) return NULL;
    PyObject *module = (nothing = PyTuple_New(0)) ? PyModule_Create(&definition) : NULL;
    if (module && PyModule_AddIntConstant(module, "interface", FASTVAE_INTERFACE)) Py_DECREF(module), module = NULL;
    return module;
}
