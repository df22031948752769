/* AVX-512 with VNNI: Ice Lake, Zen 4 and later. */
#if defined(__x86_64__)
#define ISA_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2"
#include "cpuid_x86.h"
#include "target.h"

#include "dot_avx512vnni.h"
#include "kernels.h"

static int supported(void) { return x86_features().avx512vnni; }
KERNELS(avx512vnni, supported);
#include "target_end.h"
#endif
