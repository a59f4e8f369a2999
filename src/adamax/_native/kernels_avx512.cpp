#define ADAMAX_ISA avx512
#define ADAMAX_ISA_NAME "avx512"
#include "kernels.hpp"
