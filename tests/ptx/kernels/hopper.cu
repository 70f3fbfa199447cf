// Small correct kernels for sm_90a. Tests run them as they are, then with one thing broken.
#include <cstdint>

__device__ uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(bar)), "r"(count));
}
__device__ void barrier_wait(uint64_t* bar, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra go;\nbra wait;\ngo:\n}" ::"r"(shared(bar)),
      "r"(parity)
      : "memory");
}
__device__ void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(bar)) : "memory");
}
__device__ void barrier_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(bar)),
               "r"(bytes)
               : "memory");
}

// out[s] = x[s] + 1 over `steps` rows of 512 ints: warp 4 copies in by bulk copies, warps 0..3 add
// and warp 0 copies out by a bulk store.
extern "C" __global__ void bulk_pipeline(const int* x, int* out, int steps) {
  __shared__ alignas(128) int in[2][512];
  __shared__ alignas(128) int result[512];
  __shared__ uint64_t full[2], empty[2];
  int t = threadIdx.x;
  if (t == 0)
    for (int i = 0; i < 2; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 128);
  __syncthreads();
  if (t == 128) {
    for (int s = 0; s < steps; ++s) {
      if (s >= 2) barrier_wait(&empty[s % 2], (s / 2 - 1) & 1);
      barrier_expect(&full[s % 2], 2048);
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared(in[s % 2])),
          "l"(x + s * 512), "r"(2048), "r"(shared(&full[s % 2]))
          : "memory");
    }
  } else if (t < 128) {
    for (int s = 0; s < steps; ++s) {
      barrier_wait(&full[s % 2], s / 2 & 1);
      int v[4];
      for (int i = 0; i < 4; ++i) v[i] = in[s % 2][511 - t * 4 - i] + 1;
      barrier_arrive(&empty[s % 2]);
      if (t == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      asm volatile("bar.sync 1, 128;" ::: "memory");
      for (int i = 0; i < 4; ++i) result[511 - t * 4 - i] = v[i];
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("bar.sync 2, 128;" ::: "memory");
      if (t == 0) {
        asm volatile(
            "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + s * 512),
            "r"(shared(result)), "r"(2048)
            : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
    if (t == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

__device__ uint64_t descriptor(uint32_t address) {  // K-major, no swizzle: 8 x 16-byte cores
  return (uint64_t)(address >> 4 & 0x3FFF) | (uint64_t)(128 >> 4) << 16 |
         (uint64_t)(256 >> 4) << 32;
}

// d[64, 8] = a[64, 32] · b[8, 32]ᵀ in two steps of wgmma m64n8k16, tiles written by ordinary
// stores.
extern "C" __global__ void wgmma_tile(const uint16_t* a, const uint16_t* b, float* d) {
  __shared__ alignas(128) uint16_t sa[2][64 * 16], sb[2][8 * 16];
  int t = threadIdx.x;
  for (int i = t; i < 64 * 32; i += 128) {
    int r = i / 32, k = i % 32;
    sa[k / 16][r / 8 * 128 + k % 16 / 8 * 64 + r % 8 * 8 + k % 8] = a[i];
  }
  for (int i = t; i < 8 * 32; i += 128) {
    int r = i / 32, k = i % 32;
    sb[k / 16][k % 16 / 8 * 64 + r * 8 + k % 8] = b[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  float c[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[i])::"memory");  // zeroed before the fence
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int s = 0; s < 2; ++s)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, "
        "0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "l"(descriptor(shared(sa[s]))), "l"(descriptor(shared(sb[s]))));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
  int row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + col + i % 2] = c[i];
}

// Two blocks of a cluster swap rows through each other's shared memory.
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_swap(const int* x, int* out) {
  __shared__ int mine[64];
  int t = threadIdx.x;
  uint32_t rank, there;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  mine[t] = x[blockIdx.x * 64 + t];
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared(&mine[63 - t])), "r"(rank ^ 1));
  int v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(there) : "memory");
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  mine[t] = v;
  out[blockIdx.x * 64 + t] = mine[t];
}
