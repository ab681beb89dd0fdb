"""The ops, one folder each: public function, reference, kernels of each backend, registration."""
