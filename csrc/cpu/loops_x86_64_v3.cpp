// The loops for x86-64-v3 (AVX2, F16C).
#include "instruction_sets.h"

#ifdef LNPRUNE_X86_64_LEVELS
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LNPRUNE_TABLE kX86_64_v3
#define LNPRUNE_X86_64_LEVEL 3
#define LNPRUNE_TABLE_NAME kNames[1]
#include "loops.h"
#pragma GCC pop_options
#endif
