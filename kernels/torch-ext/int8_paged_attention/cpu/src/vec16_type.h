/* Sixteen floats at a time: the type, and what every compiler does well with it. */
#ifndef VEC16_TYPE_H
#define VEC16_TYPE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vm __attribute__((vector_size(64))); /* integers, or a mask of 0 and -1 */

INLINE float larger(float a, float b) { return a > b ? a : b; }

INLINE vf vf_load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf vf_set1(float x) { return x - (vf){0}; }
INLINE vf vf_abs(vf x) { return (vf)((vm)x & 0x7fffffff); }
INLINE vf vf_select(vm mask, vf a, vf b) { return (vf)((mask & (vm)a) | (~mask & (vm)b)); }

#endif
