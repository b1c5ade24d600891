"""The operations: for each, its torch.library ops, its autograd Function and its public function."""
