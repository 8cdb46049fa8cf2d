// The engine of the emulation: fibers, barriers, scheduling, shared memory, store buffers, meter.
#include "emulation.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string_view>
#include <tuple>
#include <vector>

#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

EmulatedIndex threadIdx;
EmulatedIndex blockIdx;

namespace lnprune::emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{128} << 10;
// Blocks that run at the same time, so that one can overtake another.
constexpr int kResidentBlocks = 3;
constexpr unsigned char kGarbage = 0xa5;

enum class State { ready, at_block_barrier, at_warp_exchange, done };

struct PendingStore {
  void* address;
  size_t bytes;
  unsigned char value[16];
};

struct Block;

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Block* block = nullptr;
  unsigned thread = 0;
  State state = State::done;
  int line = 0;
  uint64_t value = 0;
  int accesses[3] = {};
  std::vector<PendingStore> stores;
};

struct Block {
  unsigned index = 0;
  bool running = false;
  unsigned laggard = 0;  // the warp that runs last in a shuffled order
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::map<std::tuple<std::string_view, int, size_t>, std::vector<uint64_t>> shared;
  std::vector<std::vector<uint64_t>> exchanged;  // per warp, the values of its last exchange
  // Per kind of access, warp and number: the 32-byte sectors touched, some more than once.
  std::map<std::tuple<int, unsigned, int>, std::vector<uint64_t>> sectors;
  std::vector<uint64_t> cached;
};

Context scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
Schedule schedule_kind = Schedule::ascending;
std::mt19937_64 random_bits;
bool metering = false;
Meter totals;
std::string message;
bool failed = false;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_fake_stack = nullptr;
#endif

void to_scheduler(bool finished) {
  Fiber* fiber = current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  fiber->context.switch_to(scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
#else
  (void)finished;
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  flush_stores();
  current->state = State::done;
  to_scheduler(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  scheduler.switch_to(fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

template <class T>
void put_in_order(std::vector<T>& sequence) {
  if (schedule_kind == Schedule::descending) std::reverse(sequence.begin(), sequence.end());
  if (schedule_kind == Schedule::shuffled) {
    std::shuffle(sequence.begin(), sequence.end(), random_bits);
  }
}

void choose_laggard(Block& block) {
  block.laggard = static_cast<unsigned>(random_bits() % block.exchanged.size());
}

void start(Block& block, unsigned index, int threads) {
  block.index = index;
  block.running = true;
  for (auto& [key, memory] : block.shared) {
    std::memset(memory.data(), kGarbage, memory.size() * sizeof(uint64_t));
  }
  block.exchanged.assign((threads + kWarp - 1) / kWarp, std::vector<uint64_t>(kWarp));
  choose_laggard(block);
  while (static_cast<int>(block.fibers.size()) < threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
  }
  block.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *block.fibers[t];
    fiber.block = &block;
    fiber.thread = static_cast<unsigned>(t);
    fiber.state = State::ready;
    std::fill(std::begin(fiber.accesses), std::end(fiber.accesses), 0);
    fiber.stores.clear();
    fiber.context.start(fiber.stack.get(), kStackBytes, fiber_main);
  }
}

int64_t distinct(std::vector<uint64_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  return std::unique(numbers.begin(), numbers.end()) - numbers.begin();
}

void finish(Block& block) {
  block.running = false;
  for (auto& [key, sectors] : block.sectors) {
    (std::get<0>(key) == static_cast<int>(Access::read) ? totals.sectors_read
                                                        : totals.sectors_written) +=
        distinct(sectors);
  }
  totals.cached_sectors += distinct(block.cached);
  block.sectors.clear();
  block.cached.clear();
}

std::string place(const Fiber& fiber) {
  const char* what = fiber.state == State::done               ? "has finished"
                     : fiber.state == State::at_block_barrier ? "waits at a barrier"
                     : fiber.state == State::at_warp_exchange ? "waits at a shuffle"
                                                              : "runs";
  return "thread " + std::to_string(fiber.thread) + " of block " +
         std::to_string(fiber.block->index) + " " + what + " (line " + std::to_string(fiber.line) +
         ")";
}

bool all_wait(const Block& block, size_t begin, size_t end, State state) {
  for (size_t t = begin; t < end; ++t) {
    const Fiber& fiber = *block.fibers[t];
    if (fiber.state != state || fiber.line != block.fibers[begin]->line) return false;
  }
  return true;
}

// Lets those go on that all wait at the same place. False: nobody can.
bool release(Block& block) {
  const size_t threads = block.fibers.size();
  bool released = false;
  if (all_wait(block, 0, threads, State::at_block_barrier)) {
    for (auto& fiber : block.fibers) fiber->state = State::ready;
    choose_laggard(block);
    released = true;
  }
  for (size_t begin = 0; begin < threads; begin += kWarp) {
    const size_t end = std::min(threads, begin + kWarp);
    if (!all_wait(block, begin, end, State::at_warp_exchange)) continue;
    for (size_t t = begin; t < end; ++t) {
      block.exchanged[begin / kWarp][t - begin] = block.fibers[t]->value;
      block.fibers[t]->state = State::ready;
    }
    released = true;
  }
  return released;
}

// One turn of every thread that can run; in a shuffled order one warp waits until no other can.
void turn(Block& block) {
  std::vector<Fiber*> ready;
  std::vector<Fiber*> late;
  for (auto& fiber : block.fibers) {
    if (fiber->state != State::ready) continue;
    const bool lags = schedule_kind == Schedule::shuffled && fiber->thread / kWarp == block.laggard;
    (lags ? late : ready).push_back(fiber.get());
  }
  if (ready.empty()) ready.swap(late);
  put_in_order(ready);
  for (Fiber* fiber : ready) {
    resume(*fiber);
    if (failed) return;
  }
  const auto done = [](const auto& fiber) { return fiber->state == State::done; };
  const auto can_run = [](const auto& fiber) { return fiber->state == State::ready; };
  if (std::all_of(block.fibers.begin(), block.fibers.end(), done)) {
    finish(block);
  } else if (!release(block) && std::none_of(block.fibers.begin(), block.fibers.end(), can_run)) {
    const Fiber& first = *block.fibers[0];
    for (const auto& fiber : block.fibers) {
      if (fiber->state != first.state || fiber->line != first.line) {
        failed = true;
        message = "divergence: " + place(first) + ", " + place(*fiber);
        return;
      }
    }
  }
}

}  // namespace

void set_schedule(Schedule schedule, uint64_t seed) {
  schedule_kind = schedule;
  random_bits.seed(seed);
}

void set_metering(bool on) { metering = on; }

Meter& meter() { return totals; }

std::string error_message() { return message; }

cudaError_t run(const std::function<void()>& thread, int64_t blocks, int threads) {
  static std::vector<std::unique_ptr<Block>> residents;
  while (residents.size() < kResidentBlocks) residents.push_back(std::make_unique<Block>());
  ++totals.launches;
  body = &thread;
  failed = false;
  std::vector<unsigned> waiting(blocks);
  std::iota(waiting.begin(), waiting.end(), 0u);
  put_in_order(waiting);
  size_t next = 0;
  while (!failed) {
    std::vector<Block*> running;
    for (auto& block : residents) {
      if (!block->running && next < waiting.size()) start(*block, waiting[next++], threads);
      if (block->running) running.push_back(block.get());
    }
    if (running.empty()) return cudaSuccess;
    put_in_order(running);
    for (Block* block : running) {
      turn(*block);
      if (failed) break;
      // Now and then a block is far ahead of the others.
      while (schedule_kind == Schedule::shuffled && block->running && !failed &&
             random_bits() % 4) {
        turn(*block);
      }
    }
  }
  residents.clear();
  return cudaErrorLaunchFailure;
}

void* shared(const char* file, int line, size_t bytes) {
  auto& memory = current->block->shared[{file, line, bytes}];
  if (memory.empty()) {
    memory.resize((bytes + 7) / 8);
    std::memset(memory.data(), kGarbage, memory.size() * sizeof(uint64_t));
  }
  return memory.data();
}

void record(Access access, const void* address, size_t bytes) {
  if (!metering) return;
  Block& block = *current->block;
  const uint64_t first = reinterpret_cast<uintptr_t>(address) / 32;
  const uint64_t last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / 32;
  if (access == Access::cached) {
    for (uint64_t sector = first; sector <= last; ++sector) block.cached.push_back(sector);
    return;
  }
  (access == Access::read ? totals.bytes_read : totals.bytes_written) +=
      static_cast<int64_t>(bytes);
  const int kind = static_cast<int>(access);
  auto& sectors = block.sectors[{kind, current->thread / kWarp, current->accesses[kind]++}];
  for (uint64_t sector = first; sector <= last; ++sector) sectors.push_back(sector);
}

void record_nothing(Access access) { ++current->accesses[static_cast<int>(access)]; }

void store(void* address, const void* value, size_t bytes) {
  PendingStore pending{address, bytes, {}};
  std::memcpy(pending.value, value, bytes);
  current->stores.push_back(pending);
}

void flush_stores() {
  for (const PendingStore& pending : current->stores) {
    std::memcpy(pending.address, pending.value, pending.bytes);
  }
  current->stores.clear();
}

void fence() {
  // In a shuffled order stores take their time, and others go on meanwhile unless they wait.
  while (schedule_kind == Schedule::shuffled && random_bits() % 2) to_scheduler(false);
  flush_stores();
}

void block_barrier(int line) {
  current->state = State::at_block_barrier;
  current->line = line;
  to_scheduler(false);
}

const uint64_t* exchange(uint64_t value, int line) {
  Fiber* fiber = current;
  fiber->value = value;
  fiber->state = State::at_warp_exchange;
  fiber->line = line;
  to_scheduler(false);
  return fiber->block->exchanged[fiber->thread / kWarp].data();
}

void fail(const std::string& what) {
  failed = true;
  message = what + ": " + place(*current);
  to_scheduler(true);
  std::abort();  // a failed launch resumes no thread
}

}  // namespace lnprune::emulation
