/* AVX-VNNI without AVX-512: Alder Lake, Sierra Forest and later. */
#if defined(__x86_64__)
#define ISA_FEATURES "avx2,fma,f16c,avxvnni"
#include "cpuid_x86.h"
#include "target.h"

#include "dot_avxvnni.h"
#include "kernels.h"

static int supported(void) { return x86_features().avxvnni; }
KERNELS(avxvnni, supported);
#include "target_end.h"
#endif
