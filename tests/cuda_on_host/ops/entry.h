// Makes an op's launches callable by name, from Python (ctypes) and from replay.cpp.
#pragma once

#include <cstring>
#include <map>
#include <string>

#include "../include/sim/launch.h"

namespace sim {

struct Entry {
  size_t params_bytes;
  cudaError_t (*launch)(const void* params);
  int64_t (*workspace)(const void* params);
};

inline std::map<std::string, Entry>& entries() {
  static std::map<std::string, Entry> all;
  return all;
}

struct Register {
  Register(const char* name, const Entry& entry) { entries()[name] = entry; }
};

}  // namespace sim

// `bytes` of workspace, an expression of the params p.
#define SIM_ENTRY(op, Params, bytes)                                                               \
  static const sim::Register register_##op(#op, {sizeof(fusedres::cuda::Params),                   \
                                                 [](const void* from) {                            \
                                                   fusedres::cuda::Params p;                       \
                                                   std::memcpy(&p, from, sizeof p);                \
                                                   return fusedres::cuda::launch_##op(p, nullptr); \
                                                 },                                                \
                                                 [](const void* from) -> int64_t {                 \
                                                   fusedres::cuda::Params p;                       \
                                                   std::memcpy(&p, from, sizeof p);                \
                                                   using namespace fusedres::cuda;                 \
                                                   return bytes;                                   \
                                                 }});

extern "C" {

// -1: no such launch, or params of another size.
inline __attribute__((used)) int64_t sim_workspace(const char* name, const void* params,
                                                   size_t bytes) {
  const auto found = sim::entries().find(name);
  if (found == sim::entries().end() || found->second.params_bytes != bytes) return -1;
  return found->second.workspace(params);
}

inline __attribute__((used)) int sim_call(const char* name, const void* params) {
  return sim::entries().at(name).launch(params);
}
}
