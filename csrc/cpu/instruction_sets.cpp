// The choice of an instruction set, made once.
#include "instruction_sets.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lnprune::cpu {
namespace {

// The place in kNames of what LNPRUNE_INSTRUCTION_SET names; of the best where it is not set.
int wanted() {
  const char* value = std::getenv("LNPRUNE_INSTRUCTION_SET");
  if (value == nullptr || *value == '\0') return 2;
  for (int place = 0; place <= 2; ++place) {
    if (std::string(value) == kNames[place]) return place;
  }
  throw std::runtime_error(std::string("lnprune: expected LNPRUNE_INSTRUCTION_SET to be ") +
                           kNames[0] + ", " + kNames[1] + " or " + kNames[2] + ", got " + value);
}

const InstructionSet& choose() {
  const int most = wanted();
#ifdef LNPRUNE_X86_64_LEVELS
  // By features: GCC before 12 does not know the levels by their names.
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("fma") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("movbe");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && most >= 2) return kX86_64_v4;
  if (v3 && most >= 1) return kX86_64_v3;
#endif
  (void)most;
  return kBaseline;
}

}  // namespace

const InstructionSet& instructions() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

const char* instruction_set() { return instructions().name; }

}  // namespace lnprune::cpu
