#define LONGATTN_TARGET neon
#include "cpu/kernels/table.h"
