#define ADAMAX_ISA base
#define ADAMAX_ISA_NAME "base"
#include "kernels.hpp"
