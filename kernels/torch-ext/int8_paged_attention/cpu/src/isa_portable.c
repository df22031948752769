/* Any processor. */
#pragma GCC diagnostic ignored "-Wpsabi"
#include "dot_portable.h"
#include "kernels.h"

static int supported(void) { return 1; }
KERNELS(portable, supported);
