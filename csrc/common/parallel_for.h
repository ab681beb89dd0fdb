// Running a loop on several threads without knowing whose threads they are.
#pragma once

#include <cstdint>

namespace hpk {

// Calls body(context, begin, end) for pieces of [0, count), each of at least `grain` but perhaps the last.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

template <typename Body>
void parallel_for(ParallelFor run, int64_t count, int64_t grain, Body body) {
  run(count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace hpk
