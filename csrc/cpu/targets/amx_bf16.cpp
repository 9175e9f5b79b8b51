#define LONGATTN_TARGET amx_bf16
#include "cpu/kernels/table.h"
