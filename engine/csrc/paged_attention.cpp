// Attention of decode steps over paged KV on the CPU: one query for each sequence, blocks read where they lie.
// A plain C interface, called through ctypes (engine/native.py); knows no Python and no torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // or an array of vectors stays in memory
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross the interface

namespace {

struct bfloat16 {
  uint16_t bits;
};

// Strides and offsets are in elements. `engine/native.py` declares the same fields in the same order.
struct DecodeArgs {
  const void* q;              // [rows, num_heads, head_dim], q_stride between rows
  const void* cache;          // one layer: [blocks][k/v][block_size][num_kv_heads][head_dim], block_stride between blocks
  void* out;                  // as q, out_stride between rows
  const int64_t* rows;        // of each sequence: its row of q and out
  const int64_t* context_lens;
  const int64_t* first_keys;  // keys before it are out of sight
  const int64_t* table_starts;
  const int64_t* block_tables;
  int64_t q_stride, out_stride, block_stride, value_offset, block_size, num_sequences;
  int32_t num_heads, num_kv_heads, head_dim, num_threads;
  float scale;
};

struct WorkItem {
  int64_t sequence;
  int64_t begin, end;  // keys
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#include "paged_attention.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "paged_attention.inc"
}
#pragma GCC pop_options
#endif
namespace portable {
#include "paged_attention.inc"
}

template <class T>
void dispatch(const DecodeArgs& args, int isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::decode_attention<T>(args);
  if (isa == 1) return avx2::decode_attention<T>(args);
#endif
  portable::decode_attention<T>(args);
}

}  // namespace

extern "C" {

// The widest instruction set that this machine and this build both have: 2 AVX-512, 1 AVX2, 0 portable code.
int32_t baton_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// dtype: 0 float32, 1 bfloat16.
void baton_decode_attention(const DecodeArgs* args, int32_t dtype, int32_t isa) {
  if (dtype == 0)
    dispatch<float>(*args, isa);
  else
    dispatch<bfloat16>(*args, isa);
}
}
