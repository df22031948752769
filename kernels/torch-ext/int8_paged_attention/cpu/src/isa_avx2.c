/* AVX2, FMA and F16C: Haswell, Zen and later. */
#if defined(__x86_64__)
#define ISA_FEATURES "avx2,fma,f16c"
#include "cpuid_x86.h"
#include "target.h"

#include "dot_avx2.h"
#include "kernels.h"

static int supported(void) { return x86_features().avx2; }
KERNELS(avx2, supported);
#include "target_end.h"
#endif
