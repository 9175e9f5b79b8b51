#define LONGATTN_TARGET avx512_bf16
#include "cpu/kernels/table.h"
