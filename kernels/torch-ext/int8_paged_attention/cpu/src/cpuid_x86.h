/* What this x86 processor has and its operating system saves. */
#ifndef CPUID_X86_H
#define CPUID_X86_H

#include <cpuid.h>

typedef struct {
    int avx2, avxvnni, avx512vnni;
} X86Features;

static inline X86Features x86_features(void)
{
    X86Features has = {0, 0, 0};
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return has;
    const unsigned needed = 1u << 27 | 1u << 28 | 1u << 12 | 1u << 29; /* OSXSAVE, AVX, FMA, F16C */
    if ((c & needed) != needed) return has;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return has;
    has.avx2 = b >> 5 & 1;
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    has.avx512vnni = has.avx2 && (b & avx512) == avx512 && (c >> 11 & 1) && (low & 0xe6) == 0xe6;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has.avxvnni = has.avx2 && (a >> 4 & 1);
    return has;
}

#endif
