#include "host/forward_launch.h"

template const char* longattn::cuda::forward_of_width<256>(const LongattnCall&);
