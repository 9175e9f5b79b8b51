#include "host/decode_launch.h"

template const char* longattn::cuda::decode_of_width<256>(const LongattnCall&);
