// The loops for x86-64-v4 (AVX-512).
#include "instruction_sets.h"

#ifdef LNPRUNE_X86_64_LEVELS
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define LNPRUNE_TABLE kX86_64_v4
#define LNPRUNE_X86_64_LEVEL 4
#define LNPRUNE_TABLE_NAME kNames[2]
#include "loops.h"
#pragma GCC pop_options
#endif
