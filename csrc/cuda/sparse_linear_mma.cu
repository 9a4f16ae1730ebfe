// Products of packed 16-bit weights with 2 to 16 tokens on the tensor cores: y [tokens, rows] = x Wᵀ + bias.
//
// A thread block takes 16 rows, its warps take equal shares of the columns and add up their sums at the end. A warp
// multiplies 16 rows × 64 columns at a time, as four products m16n8k16 per 8 tokens with the weight as first operand.
// The order of the columns inside a product is free: lane (g, t), the t-th of the quad g, gives the products columns
// 8t … 8t + 7 of each half of the word, of rows g and g + 8 for the weight and of token g for x, whose eight values are
// one load of 16 bytes.
//
// The values of a row lie one behind the other, so they stream through a ring in shared memory that asynchronous copies
// of 16 bytes keep full: each byte is read once, without knowing the bits ahead. At 50 % a ring holds four words, of
// which up to three are under way: 16 warps on a multiprocessor then have some 40 KB in flight. A first look at the bits
// tells every warp where the values of its columns begin; the bits are then read again from cache.
//
// Bytes: the packed weight, and x once per thread block from the second-level cache. Instructions: about 340 per lane
// for 1,024 weights at 50 %, whether 8 tokens or 16: 180 to lay them out and multiply, 20 reads of shared memory among
// them, and 100 to keep the rings full.
#include "cuda/packed.cuh"
#include "cuda/tensor_core.cuh"

namespace pyprune::cuda {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int ROWS = 16, QUAD = 4, TOKENS = 8;  // of a product: rows; lanes that share a row; tokens
constexpr uint32_t CHUNK = 16, RING = 256;      // bytes of one copy; of a row's ring
constexpr uint32_t ROW = RING + CHUNK;          // a ring and its first chunk once more: reads need not wrap around
constexpr int PITCH = 20;                       // of a token's sums in shared memory: no bank conflicts
constexpr size_t SHARED = WARPS * ROWS * (ROW + sizeof(uint32_t));
static_assert(WARPS * 2 * TOKENS * PITCH * sizeof(float) <= WARPS * ROWS * ROW, "the sums take the rings' place");

// The stored values of one row's share of columns, on their way through its ring. Places are in bytes. The lanes of the
// quad that multiplies with them start every fourth copy each; all else is the same in each of them.
struct Stream {
    const char* source;  // of the lane's next copy
    char* ring;
    uint32_t mine;             // place of the lane's next copy
    uint32_t at, end;          // places of the next value and behind the last one
    uint32_t filled;           // behind the last copy that was started
    uint32_t before, earlier;  // the same one step and two steps ago

    __device__ __forceinline__ void open(const char* first, uint32_t bytes, char* memory, uint32_t member) {
        at = uint32_t(reinterpret_cast<uintptr_t>(first)) % CHUNK;
        end = at + bytes;
        filled = before = earlier = 0;
        mine = member * CHUNK;
        source = first - at + mine;
        ring = memory;
    }

    // Start the copies of all chunks there is room for, the one that is being read counted.
    __device__ __forceinline__ void refill() {
        const uint32_t whole = end / CHUNK * CHUNK, all = (end + CHUNK - 1) / CHUNK * CHUNK;
        const uint32_t limit = min(at / CHUNK * CHUNK + RING, all);
        PYPRUNE_ROLL
        while (mine < min(limit, whole)) copy(CHUNK);
        if (mine < limit) copy(end - whole);
        earlier = before;
        before = filled;
        filled = limit;
    }

    __device__ __forceinline__ void copy(uint32_t bytes) {
        copy_async<CHUNK>(ring + mine % RING, source, int(bytes));
        if (mine % RING == 0) copy_async<CHUNK>(ring + RING, source, int(bytes));
        mine += QUAD * CHUNK;
        source += QUAD * CHUNK;
    }
};

// Two bytes, in bytes 0 and 2 with a copy of each behind it, as four nibbles each: 4 + a pair of bits.
__device__ __forceinline__ uint32_t pairs_of_bits(uint32_t bytes) {
    const uint32_t nibbles = (bytes & 0x000f000fu) | (bytes >> 4 & 0x0f000f00u);
    return (nibbles & 0x03030303u) | (nibbles << 2 & 0x30303030u) | 0x44444444u;
}

// The weights of eight columns as four pairs: where a column's bit is one the next of the values from a place on, else 0.
// `bits`: four nibbles as above.
__device__ __forceinline__ void expand8(uint32_t (&pair)[4], uint32_t bits, const char* ring, uint32_t at) {
    // of each pair of bits: which bytes of the next two values become its columns, 4 and above for a zero
    const uint32_t first = permute_bytes(0, 0x10541054u, bits), second = permute_bytes(0, 0x32107654u, bits);
    const uint32_t taken = permute_bytes(0, 0x20101000u, bits);  // bits of the values that it takes
    const uint32_t* from = reinterpret_cast<const uint32_t*>(ring + at % RING / 4 * 4);
    uint32_t window[5];
    PYPRUNE_UNROLL
    for (int k = 0; k < 5; ++k) window[k] = from[k];
    PYPRUNE_UNROLL
    for (int k = 0; k < 4; ++k) window[k] = shift_bytes(window[k], window[k + 1], at);
    PYPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
        pair[i] = permute_bytes(window[0], 0, permute_bytes(first, second, 0x40 + 0x11 * i));
        const uint32_t by = permute_bytes(taken, 0, 0x4440 + i);
        PYPRUNE_UNROLL
        for (int k = 0; k < 3 - i; ++k) window[k] = shift_bits(window[k], window[k + 1], by);
    }
}

// Eight values of x, zeros from `count` on.
template <class T>
__device__ __forceinline__ void load8(uint32_t (&pair)[4], const T* p, int count) {
    PYPRUNE_UNROLL
    for (int i = 0; i < 4; ++i)
        pair[i] = (2 * i < count ? p[2 * i].bits : 0u) | (2 * i + 1 < count ? p[2 * i + 1].bits : 0u) << 16;
}

template <class T, int TILES>
__global__ void __launch_bounds__(THREADS, 2) some_tokens_kernel(const Product<T> a, int tokens) {
    PYPRUNE_SHARED(char, pool);
    uint32_t* counts = reinterpret_cast<uint32_t*>(pool + WARPS * ROWS * ROW);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / QUAD, member = lane % QUAD;
    const int words = (a.w.columns + WORD - 1) / WORD, share = (words + WARPS - 1) / WARPS;
    const int first = min(warp * share, words), last = min(first + share, words);
    const int64_t top = int64_t(blockIdx.x) * ROWS;
    const auto bits_of = [&](int side, int word) {
        const int64_t row = top + group + 8 * side;
        return row < a.w.rows && word < last ? row_word(a.w, row, word) : uint64_t(0);
    };

    uint32_t count[2] = {};
    PYPRUNE_UNROLL
    for (int side = 0; side < 2; ++side) {
        PYPRUNE_ROLL
        for (int i = 0; i < share; i += QUAD) count[side] += __popcll(bits_of(side, first + i + member));
        count[side] += __shfl_xor_sync(FULL, count[side], 1, WARP);
        count[side] += __shfl_xor_sync(FULL, count[side], 2, WARP);
        if (member == 0) counts[warp * ROWS + group + 8 * side] = count[side];
    }
    __syncthreads();
    Stream stream[2];
    PYPRUNE_UNROLL
    for (int side = 0; side < 2; ++side) {
        const int in_tile = group + 8 * side;
        int64_t start = top + in_tile < a.w.rows ? a.w.offsets[top + in_tile] : 0;
        for (int other = 0; other < warp; ++other) start += counts[other * ROWS + in_tile];
        stream[side].open(reinterpret_cast<const char*>(a.w.values + start), count[side] * sizeof(T),
                          pool + (warp * ROWS + in_tile) * ROW, member);
    }

    const T* x[TILES];
    PYPRUNE_UNROLL
    for (int n = 0; n < TILES; ++n)  // the last token in place of those that are not there
        x[n] = a.x + min(group + n * TOKENS, tokens - 1) * a.x_stride + first * WORD + member * 8;
    const uint32_t below = (1u << 8 * member) - 1;
    float sum[TILES][4] = {};
    uint64_t mine[2], coming[2] = {bits_of(0, first + member), bits_of(1, first + member)};
    for (int step = 0; step < share; ++step) {  // of all warps as many, so that the compiler knows them to be together
        const int i = first + step, turn = step % QUAD;
        if (turn == 0) {
            PYPRUNE_UNROLL
            for (int side = 0; side < 2; ++side) {
                mine[side] = coming[side];
                coming[side] = bits_of(side, i + QUAD + member);
            }
        }
        const int left = a.w.columns - i * WORD - member * 8;
        uint32_t given[TILES][2][4];
        if (a.whole && left >= 40) {
            PYPRUNE_UNROLL
            for (int n = 0; n < TILES; ++n) {
                PYPRUNE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const uint4 eight = *reinterpret_cast<const uint4*>(x[n] + 32 * half);
                    memcpy(given[n][half], &eight, sizeof eight);
                }
            }
        } else {
            PYPRUNE_UNROLL
            for (int n = 0; n < TILES; ++n) {
                PYPRUNE_UNROLL
                for (int half = 0; half < 2; ++half) load8(given[n][half], x[n] + 32 * half, left - 32 * half);
            }
        }
        PYPRUNE_UNROLL
        for (int n = 0; n < TILES; ++n) x[n] += WORD;
        uint32_t word[2][2];
        uint32_t next[2];
        bool here = true, nearly = true;  // what was started two steps, one step ago has all that this step needs
        PYPRUNE_UNROLL
        for (int side = 0; side < 2; ++side) {
            stream[side].refill();
            word[side][0] = __shfl_sync(FULL, uint32_t(mine[side]), turn, QUAD);
            word[side][1] = __shfl_sync(FULL, uint32_t(mine[side] >> 32), turn, QUAD);
            next[side] = stream[side].at + (__popc(word[side][0]) + __popc(word[side][1])) * sizeof(T);
            here &= next[side] <= stream[side].earlier;
            nearly &= next[side] <= stream[side].before;
        }
        close_copies();
        if (here)
            wait_for_copies_but<2>();
        else if (nearly)
            wait_for_copies_but<1>();
        else
            wait_for_copies();
        __syncwarp();
        PYPRUNE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t bits = pairs_of_bits(permute_bytes(word[0][half], word[1][half], 0x4400 + 0x1111 * member));
            uint32_t pair[2][4];
            PYPRUNE_UNROLL
            for (int side = 0; side < 2; ++side) {
                const int values = __popc(word[side][half] & below) + (half ? __popc(word[side][0]) : 0);
                expand8(pair[side], bits >> 16 * side, stream[side].ring, stream[side].at + values * sizeof(T));
            }
            PYPRUNE_UNROLL
            for (int j = 0; j < 4; j += 2) {
                const uint32_t weight[4] = {pair[0][j], pair[1][j], pair[0][j + 1], pair[1][j + 1]};
                PYPRUNE_UNROLL
                for (int n = 0; n < TILES; ++n) {
                    const uint32_t columns[2] = {given[n][half][j], given[n][half][j + 1]};
                    mma_16x8x16(sum[n], weight, columns, T{});
                }
            }
        }
        stream[0].at = next[0];
        stream[1].at = next[1];
        __syncwarp();  // the quad has read what the next copies overwrite
    }

    wait_for_copies();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(pool);  // [warps, tokens, PITCH]
    PYPRUNE_UNROLL
    for (int n = 0; n < TILES; ++n) {
        PYPRUNE_UNROLL
        for (int k = 0; k < 4; ++k) {
            const int token = n * TOKENS + 2 * member + k % 2, in_tile = group + k / 2 * 8;
            sums[(warp * TILES * TOKENS + token) * PITCH + in_tile] = sum[n][k];
        }
    }
    __syncthreads();
    const int token = threadIdx.x / ROWS, in_tile = threadIdx.x % ROWS;
    const int64_t row = top + in_tile;
    if (token >= tokens || row >= a.w.rows) return;
    float total = 0;
    for (int other = 0; other < WARPS; ++other) total += sums[(other * TILES * TOKENS + token) * PITCH + in_tile];
    if (a.bias != nullptr) total += to_float(a.bias[row]);
    a.out[token * a.w.rows + row] = from_float(total, static_cast<T*>(nullptr));
}

template <class T>
void sparse_linear_mma(const Launcher& launch, const Product<T>& a, int tokens) {
    const int64_t blocks = (a.w.rows + ROWS - 1) / ROWS;
    if (tokens <= TOKENS)
        launch(some_tokens_kernel<T, 1>, blocks, THREADS, SHARED, a, tokens);
    else
        launch(some_tokens_kernel<T, 2>, blocks, THREADS, SHARED, a, tokens);
}

template void sparse_linear_mma(const Launcher&, const Product<bf16>&, int);
template void sparse_linear_mma(const Launcher&, const Product<f16>&, int);

}  // namespace pyprune::cuda
