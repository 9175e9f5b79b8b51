#define LONGATTN_TARGET avx512
#include "cpu/kernels/table.h"
