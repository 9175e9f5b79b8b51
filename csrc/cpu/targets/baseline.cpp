#define LONGATTN_TARGET baseline
#include "cpu/kernels/table.h"
