#include "host/backward_launch.h"

template const char* longattn::cuda::backward_of_width<192>(const LongattnCall&);
