#define LONGATTN_TARGET avx2
#include "cpu/kernels/table.h"
