#include "host/decode_launch.h"

template const char* longattn::cuda::decode_of_width<64>(const LongattnCall&);
