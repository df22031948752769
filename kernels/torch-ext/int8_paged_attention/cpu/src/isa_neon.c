/* Arm with the dot product extension: Cortex-A76, Neoverse N1, Apple M1 and later. */
#if defined(__aarch64__)
#ifdef __clang__
#define ISA_FEATURES "dotprod"
#else
#define ISA_FEATURES "arch=armv8.2-a+dotprod"
#endif
#include "target.h"

#include "dot_neon.h"
#include "kernels.h"

#ifdef __linux__
#include <sys/auxv.h>

static int supported(void) { return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */ }
#else
static int supported(void) { return 1; /* every Apple processor of this architecture */ }
#endif
KERNELS(neon, supported);
#include "target_end.h"
#endif
