// The choice of an instruction set, made once.
#include "instruction_sets.h"

#include <cstdlib>
#include <cstring>

namespace lnprune::cpu {
namespace {

const InstructionSet& choose() {
#ifdef LNPRUNE_X86_64_LEVELS
  const char* wanted = std::getenv("LNPRUNE_INSTRUCTION_SET");
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
  const bool v3 = __builtin_cpu_supports("x86-64-v3");
  if (v4 && (wanted == nullptr || std::strcmp(wanted, kX86_64_v4.name) == 0)) return kX86_64_v4;
  if (v3 && (wanted == nullptr || std::strcmp(wanted, kBaseline.name) != 0)) return kX86_64_v3;
#endif
  return kBaseline;
}

}  // namespace

const InstructionSet& instructions() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

const char* instruction_set() { return instructions().name; }

}  // namespace lnprune::cpu
