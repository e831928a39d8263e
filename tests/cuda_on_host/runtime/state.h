// The simulated machine: fibers in blocks in clusters in the one grid that runs. Everything happens
// on one thread of the host; a fiber runs until it waits for another.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../include/sim/launch.h"
#include "../include/sim/runtime.h"
#include "sanitizers.h"

namespace sim {

struct Block;
struct Warpgroup;  // warpgroups.cpp

// The stack and registers of a fiber, or of the scheduler.
struct Context {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest address; null: the thread's own
  size_t slot = 0;        // which of the stacks
#if defined(SIM_ASAN)
  void* fake_stack = nullptr;
#endif
#if defined(SIM_TSAN)
  void* tsan = nullptr;
#endif
};

// Where a thread waits: what it called, and the line if that matters.
struct Site {
  const char* name = "its start";
  const char* file = nullptr;
  int line = 0;
  std::string text() const;  // "name (file:line)"
  bool operator==(const Site& other) const;
};

// What a lane brings to a warp operation, and takes from it.
struct Exchanged {
  uint64_t value = 0, result = 0;
  int argument = 0, width = 32;
};

// A copy of a thread's that has not landed.
struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, bytes_there;
  int group;
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 index{};
  unsigned rank = 0;
  bool done = false;
  Site waits_at;
  Exchanged lane;
  std::deque<AsyncCopy> copies;
  int group = 0;  // that copies belong to now
};

// A barrier between `waiting.size()` and the next multiple of its threads. Arrivals of two phases
// use two tokens: a fiber that is late to leave must not acquire what the next phase released.
struct Barrier {
  std::vector<Fiber*> waiting;
  Site site;
  unsigned phase = 0;
  Token tokens[2];
};

struct WarpOperation {
  unsigned mask = 0, arrived = 0;
  const char* name = "";
};

struct Warp {
  unsigned alive = 0;
  std::map<unsigned, WarpOperation> pending;  // by mask
  std::map<unsigned, Barrier> barriers;       // of __syncwarp, by mask
};

struct Mbarrier {
  int arrivals = 0, pending = 0, bytes = 0, phase = 0;
  std::vector<Fiber*> waiting;
  Token tokens[2];
};

struct SharedArray {
  const void* key;
  char* data;
  size_t bytes;
  std::string name;
  uint64_t address;  // in the block's shared memory
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // in the cluster
  Cluster* cluster = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];  // 0: __syncthreads()
  std::vector<Fiber*> ready;
  size_t alive = 0;
  std::vector<SharedArray> shared;
  std::map<uint64_t*, Mbarrier> mbarriers;
  std::map<unsigned, std::shared_ptr<Warpgroup>> warpgroups;  // by first thread
};

// A copy by the copy engine.
struct BulkCopy {
  char* to;
  size_t bytes;
  std::function<void()> write;
  Block* block;
  uint64_t* barrier;
  std::unique_ptr<Token> issued;
};

// Forward lets copies land as late as the program allows, reverse as early, random between.
enum class Order { kForward, kReverse, kRandom };

constexpr size_t kDefaultShared = 48 * 1024;  // of a block whose kernel was not given more

struct State {
  Fiber* current = nullptr;  // null in the scheduler
  Context scheduler;
  std::function<void()> thread;  // what a fiber runs
  std::string kernel;
  std::string error;
  std::string launched;     // a line a launch until they are taken: kernel, blocks of a cluster
  size_t blocks = 0;        // of the grid
  size_t shared_bytes = 0;  // dynamic
  size_t shared_allowed = kDefaultShared;  // static arrays included
  bool cooperative = false;
  Barrier grid_barrier;
  std::deque<BulkCopy> copies;
  std::map<const void*, int> shared_limits;  // that were set, by kernel
  Token started, finished;
  Order order = Order::kForward;
  std::mt19937_64 random;
  int sms = 4, shared_limit = 227 * 1024, major = 9;
  int blocks_of_sm = 8;  // of 256 threads, by their registers
  int cluster_sms = 8;   // among which the blocks of a cluster can be
};
extern State state;

// --- contexts.cpp
void start_fiber(Fiber* fiber, size_t slot);  // on a stack of its own; it runs when resumed
void finish_fiber(Fiber* fiber);
void free_used_fibers();
void resume(Fiber* fiber);
void leave();  // back to the scheduler

// --- scheduler.cpp
[[noreturn]] void fail(const std::string& problem);  // ends the launch, with this message
void note_error(const std::string& problem);         // the same from the scheduler
void wake(Fiber* fiber);
void wait(const Site& at);  // until woken
std::string place(const Fiber& fiber);

// --- memory.cpp, mbarriers.cpp, barriers.cpp, warps.cpp
void free_shared(Block* block);
bool land_a_copy();
void start_copy(char* to, size_t bytes, uint64_t* barrier, std::function<void()> write);
void check_not_multiplied(const Block& block, const char* from, size_t bytes);
void check_no_copy_to(const Block& block, const char* from, size_t bytes);
// The block's shared memory at this address; what: who reads or writes it, for the message.
char* shared_at(const Block& block, uint64_t address, size_t bytes, const char* what);
// All threads of a barrier come to it, at the same site. It orders their accesses, if asked to.
void meet(Barrier* barrier, size_t threads, const Site& site, bool orders = true);
void check_no_one_waits_for(const Fiber& finished);
// All 32 lanes give a value; the last to come calls finish with them.
void collect(const char* name, uint64_t value, const std::function<void(const uint64_t*)>& finish);

}  // namespace sim
