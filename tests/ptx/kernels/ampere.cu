// Small correct kernels for sm_80. Tests run them as they are, then with one thing broken.

// out[i] = a * x[i] + y[i], the last block partly masked.
extern "C" __global__ void axpy(const float* x, const float* y, float* out, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = a * x[i] + y[i];
}

// out[block] = sum of 256 elements: shared partials, one barrier a level.
extern "C" __global__ void block_sum(const float* x, float* out) {
  __shared__ float part[256];
  int t = threadIdx.x;
  part[t] = x[blockIdx.x * 256 + t];
  __syncthreads();
  for (int half = 128; half > 0; half >>= 1) {
    if (t < half) part[t] += part[t + half];
    __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

// out = xᵀ for 32 x 32 tiles, a column of padding against bank conflicts.
extern "C" __global__ void transpose(const float* x, float* out, int rows, int cols) {
  __shared__ float tile[32][33];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8)
    if (r + i < rows && c < cols) tile[threadIdx.y + i][threadIdx.x] = x[(r + i) * cols + c];
  __syncthreads();
  int c2 = blockIdx.y * 32 + threadIdx.x, r2 = blockIdx.x * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8)
    if (r2 + i < cols && c2 < rows) out[(r2 + i) * rows + c2] = tile[threadIdx.x][threadIdx.y + i];
}

// out[i] = x of the neighbouring lane, handed over in shared memory within each warp.
extern "C" __global__ void warp_rotate(const int* x, int* out) {
  __shared__ int word[64];
  int t = threadIdx.x, lane = t & 31;
  word[t] = x[t];
  __syncwarp();
  out[t] = word[(t & ~31) | ((lane + 1) & 31)];
}

// out = running sum over `stages` rows of 128 x 16 bytes through a ring of three cp.async buffers.
extern "C" __global__ void ring_sum(const int4* x, int4* out, int steps) {
  __shared__ int4 ring[3][128];
  int t = threadIdx.x, other = 127 - t;
  auto issue = [&](int s) {
    if (s < steps) {
      unsigned at = __cvta_generic_to_shared(&ring[s % 3][t]);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(x + s * 128 + t));
    }
    asm volatile("cp.async.commit_group;");
  };
  issue(0);
  issue(1);
  int4 sum = {0, 0, 0, 0};
  for (int s = 0; s < steps; ++s) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    int4 v = ring[s % 3][other];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    issue(s + 2);
  }
  out[t] = sum;
}

// Warp 0 fills, warp 1 empties, over two named barriers.
extern "C" __global__ void named_barriers(const int* x, int* out, int steps) {
  __shared__ int buffer[32];
  int lane = threadIdx.x & 31;
  for (int s = 0; s < steps; ++s) {
    if (threadIdx.x < 32) {
      asm volatile("bar.sync 2, 64;" ::: "memory");
      buffer[lane] = x[s * 32 + lane];
      asm volatile("bar.arrive 1, 64;" ::: "memory");
    } else {
      asm volatile("bar.arrive 2, 64;" ::: "memory");
      asm volatile("bar.sync 1, 64;" ::: "memory");
      out[s * 32 + lane] = buffer[31 - lane] + 1;
    }
  }
}

// Split sum: every block writes a part, the last to arrive adds them up in order.
extern "C" __global__ void last_block_sum(const int* x, int* part, unsigned* count, int* out) {
  __shared__ bool last;
  int t = threadIdx.x;
  part[blockIdx.x * 64 + t] = x[blockIdx.x * 64 + t] * 3;
  __threadfence();
  __syncthreads();
  if (t == 0) last = atomicAdd(count, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  int sum = 0;
  for (int b = 0; b < gridDim.x; ++b) sum += part[b * 64 + (63 - t)];
  out[t] = sum;
}

// A chain: block b adds to what block b - 1 published, waiting for its flag.
extern "C" __global__ void chained_sum(const int* x, int* prefix, int* flag) {
  int t = threadIdx.x, b = blockIdx.x;
  if (b > 0 && t == 0) {
    int seen = 0;
    while (!seen)
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                   : "=r"(seen)
                   : "l"(flag + b - 1)
                   : "memory");
  }
  __syncthreads();
  int before = b > 0 ? prefix[(b - 1) * 64 + t] : 0;
  prefix[b * 64 + t] = before + x[b * 64 + t];
  __syncthreads();
  if (t == 0)
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(flag + b), "r"(1) : "memory");
}
