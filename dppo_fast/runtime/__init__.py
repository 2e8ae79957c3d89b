"""What runs below the algorithms: the C++ extension, CUDA graphs, profiling, seeding."""
