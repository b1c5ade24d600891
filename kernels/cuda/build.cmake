# cmake -P: libfastvae_cuda.so by nvcc, or libfastvae_cuda.txt with the reason why there is none. Never fails, so that
# the rest of the library is built in any case. Wants SOURCE, OUTPUT, VERSION, WERROR;
# BULK=0 for kernels without bulk copies, ARCHITECTURES="90" or "80;90" instead of all of 80, 90 and 100 that nvcc knows.

function(give_up reason)
  file(REMOVE "${OUTPUT}/libfastvae_cuda.so")
  file(WRITE "${OUTPUT}/libfastvae_cuda.txt" "${reason}\n")
  message(WARNING "the CUDA kernels were not built: ${reason}")
endfunction()

find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)  # the last after PATH
if(NOT NVCC)
  give_up("libfastvae_cuda.so was not built: there is no nvcc (CUDA_HOME says where)")
  return()
endif()

if(NOT DEFINED BULK)
  set(BULK 1)
endif()

# Machine code for each architecture, and PTX of the last for what comes after.
execute_process(COMMAND ${NVCC} --list-gpu-code RESULT_VARIABLE failed OUTPUT_VARIABLE known ERROR_VARIABLE log)
if(failed)
  string(STRIP "${log}" log)
  give_up("libfastvae_cuda.so was not built: ${NVCC} does not run: ${log} (${failed})")
  return()
endif()
set(wanted 80 90 100)
if(ARCHITECTURES)
  set(wanted ${ARCHITECTURES})
  list(SORT wanted COMPARE NATURAL)
endif()
foreach(architecture ${wanted})
  if("${known}\n" MATCHES "sm_${architecture}[\r\n ]")
    list(APPEND targets -gencode=arch=compute_${architecture},code=sm_${architecture})
    set(last ${architecture})
  elseif(ARCHITECTURES)
    give_up("libfastvae_cuda.so was not built: ${NVCC} does not know sm_${architecture}, which ARCHITECTURES asks for")
    return()
  endif()
endforeach()
if(NOT last)
  give_up("libfastvae_cuda.so was not built: ${NVCC} knows none of sm_80, sm_90 and sm_100")
  return()
endif()
list(APPEND targets -gencode=arch=compute_${last},code=compute_${last})

file(GLOB sources "${SOURCE}/kernels/cuda/*.cu")
set(options -std=c++20 -O3 -Xptxas -v --cudart static --threads 0 -Xcompiler -fPIC,-fvisibility=hidden
    -I "${SOURCE}/kernels/include" -DFASTVAE_ISA=cuda "-DFASTVAE_VERSION=\"${VERSION}\""
    -DFASTVAE_CUDA_BULK=${BULK})
if(WERROR)
  list(APPEND options -Werror all-warnings)
endif()
execute_process(COMMAND ${NVCC} ${options} ${targets} -shared -o "${OUTPUT}/libfastvae_cuda.so" ${sources}
                RESULT_VARIABLE failed OUTPUT_VARIABLE log ERROR_VARIABLE log)
file(WRITE "${OUTPUT}/libfastvae_cuda.log" "${log}")
if(failed)
  string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" first "${log}")
  give_up("libfastvae_cuda.so was not built: ${first} (${NVCC}; ${OUTPUT}/libfastvae_cuda.log)")
else()
  file(REMOVE "${OUTPUT}/libfastvae_cuda.txt")
endif()
