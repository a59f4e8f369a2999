#define ADAMAX_ISA avx2
#define ADAMAX_ISA_NAME "avx2"
#include "kernels.hpp"
