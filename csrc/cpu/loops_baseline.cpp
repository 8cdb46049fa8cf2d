// The loops for the compiler's default instruction set.
#include "instruction_sets.h"
#define LNPRUNE_TABLE kBaseline
#define LNPRUNE_X86_64_LEVEL 1
#define LNPRUNE_TABLE_NAME kNames[0]
#include "loops.h"
