// replay FILE: runs the calls that cuda_host.record() kept, in forward, reverse and random order,
// each operand in an allocation of its own. The results must be the same bits in every order. Built
// with sanitizers, it is their way to see the kernels.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "ops/entry.h"

extern "C" void sim_set_order(int order, unsigned long long seed);
extern "C" const char* sim_take_error();

namespace {

struct Operand {
  uint64_t member;      // offset of the pointer in the params
  uint64_t misaligned;  // bytes beyond a multiple of 16
  std::vector<char> content;
};

struct Call {
  std::string name;
  std::vector<char> params;
  std::vector<Operand> operands;
};

template <typename T>
bool read(std::istream& in, T* value) {
  return static_cast<bool>(in.read(reinterpret_cast<char*>(value), sizeof *value));
}

template <typename Size, typename Bytes>
void read_bytes(std::istream& in, Bytes* bytes) {
  Size size = 0;
  read(in, &size);
  bytes->resize(size);
  in.read(bytes->data(), static_cast<std::streamsize>(size));
}

bool read_call(std::istream& in, Call* call) {
  if (in.peek() == std::istream::traits_type::eof()) return false;
  read_bytes<uint32_t>(in, &call->name);
  read_bytes<uint64_t>(in, &call->params);
  uint32_t operands = 0;
  read(in, &operands);
  call->operands.resize(operands);
  for (Operand& operand : call->operands) {
    read(in, &operand.member);
    read(in, &operand.misaligned);
    read_bytes<uint64_t>(in, &operand.content);
  }
  return true;
}

// Runs the call on fresh copies of its operands, which it leaves in `results`.
bool run(Call call, std::vector<std::vector<char>>* results) {
  std::vector<void*> blocks;
  std::vector<char*> copies;
  for (const Operand& operand : call.operands) {
    void* block = nullptr;  // ends where the operand ends
    if (posix_memalign(&block, 256, operand.misaligned + operand.content.size()) != 0) return false;
    char* copy = static_cast<char*>(block) + operand.misaligned;
    std::memcpy(copy, operand.content.data(), operand.content.size());
    std::memcpy(call.params.data() + operand.member, &copy, sizeof copy);
    blocks.push_back(block);
    copies.push_back(copy);
  }
  const int error = sim_call(call.name.c_str(), call.params.data());
  results->clear();
  for (size_t i = 0; i < copies.size(); ++i) {
    results->emplace_back(copies[i], copies[i] + call.operands[i].content.size());
    std::free(blocks[i]);
  }
  if (error != 0) {
    std::printf("%s: error %d; %s\n", call.name.c_str(), error, sim_take_error());
  }
  return error == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 64;
  std::ifstream in(argv[1], std::ios::binary);
  Call call;
  int calls = 0;
  for (; read_call(in, &call); ++calls) {
    std::vector<std::vector<char>> first, results;
    for (int order = 0; order < 3; ++order) {
      sim_set_order(order, 1);
      if (!run(call, order == 0 ? &first : &results)) return 1;
      if (order > 0 && results != first) {
        std::printf("%s: other bits in order %d\n", call.name.c_str(), order);
        return 1;
      }
    }
  }
  std::printf("%d calls\n", calls);
  return 0;
}
