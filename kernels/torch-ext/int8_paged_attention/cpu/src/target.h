/* Compile what follows for ISA_FEATURES, whatever the command line says. */
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define ATTRIBUTE_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
ATTRIBUTE_TARGET(ISA_FEATURES)
#else
#pragma GCC push_options
#define TARGET(features) PRAGMA(GCC target(features))
TARGET(ISA_FEATURES)
#endif
