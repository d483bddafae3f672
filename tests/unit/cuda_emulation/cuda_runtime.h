/* The small part of CUDA that ms_deform_attn_cuda.cu uses, on the CPU, for g++ -x c++ -I <this folder>.
 *
 * Every thread of a block is a fiber that runs until it must wait for its warp (shuffles, __syncwarp) or ends. The order of the
 * fibers is drawn anew for each round, so that a missing barrier shows as a wrong result; shared memory starts as NaN; a
 * barrier that not all of its lanes reach ends the process. With AddressSanitizer, so does shared memory beyond what the
 * launch asked for.
 */
#ifndef CUDA_EMULATION_RUNTIME_H
#define CUDA_EMULATION_RUNTIME_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define EMULATION_FORBID(start, bytes) ASAN_POISON_MEMORY_REGION(start, bytes)
#define EMULATION_ALLOW(start, bytes) ASAN_UNPOISON_MEMORY_REGION(start, bytes)
#else
#define EMULATION_FORBID(start, bytes)
#define EMULATION_ALLOW(start, bytes)
#endif

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH_LIST__ emulated

using std::floor;

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

/* -------------------------------------------------------------------------------------------------------------- fibers */

namespace emulation {

constexpr int WARP_LANES = 32, MAX_THREADS = 1024, MAX_SHARED_BYTES = 48 * 1024;
constexpr size_t STACK_BYTES = 32 * 1024; /* AddressSanitizer takes time in proportion with each switch */

enum class State { READY, WAITING, ENDED };

/* Where a fiber or the scheduler goes on. */
struct Place {
    ucontext_t context;
    jmp_buf jump;
    bool is_fresh; /* a fiber that has not run yet */
};

/* Jumps are several times faster than swapcontext, which asks the kernel each time, but AddressSanitizer does not know them. */
inline void go(Place &from, Place &to)
{
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.jump))
        return;
    if (!to.is_fresh)
        _longjmp(to.jump, 1);
    to.is_fresh = false;
    setcontext(&to.context);
#endif
}

struct Fiber {
    Place place;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    State state;
    unsigned mask;        /* of the lanes that this fiber waits for */
    uint64_t handed_over; /* what shuffles read */
    dim3 thread;
};

inline std::vector<Fiber> fibers(MAX_THREADS);
inline Fiber *running;
inline Place scheduler;
inline dim3 block;
inline std::function<void()> kernel;
inline std::mt19937 order(1);

[[noreturn]] inline void fail(const char *reason)
{
    fprintf(stderr, "CUDA emulation: %s\n", reason);
    abort();
}

inline Fiber &lane(int index) { return fibers[running->thread.x / WARP_LANES * WARP_LANES + index]; }

inline void wait_for(unsigned mask)
{
    if (!(mask >> running->thread.x % WARP_LANES & 1))
        fail("a lane waits for others that do not wait for it");
    running->state = State::WAITING, running->mask = mask;
    go(running->place, scheduler);
}

/* Let the lanes go on that wait for each other, once all of them do. */
inline bool release(unsigned first, unsigned threads)
{
    unsigned waiting = 0;
    for (unsigned i = first; i < first + WARP_LANES && i < threads; i++)
        waiting |= (unsigned)(fibers[i].state == State::WAITING) << (i - first);
    for (unsigned i = first; i < first + WARP_LANES && i < threads; i++) {
        const unsigned mask = fibers[i].mask;
        if (fibers[i].state != State::WAITING || (waiting & mask) != mask)
            continue;
        for (unsigned j = first; j < first + WARP_LANES && j < threads; j++)
            if (mask >> (j - first) & 1) {
                if (fibers[j].mask != mask)
                    fail("lanes at one barrier name different lanes");
                fibers[j].state = State::READY;
            }
        return true;
    }
    return false;
}

inline void run_fiber()
{
    kernel();
    running->state = State::ENDED;
    go(running->place, scheduler);
}

inline void run_block(unsigned threads)
{
    std::vector<unsigned> turns(threads);
    for (unsigned i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        turns[i] = i, fiber.state = State::READY, fiber.thread = dim3(i, 0, 0);
        ucontext_t &context = fiber.place.context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack.data(), context.uc_stack.ss_size = fiber.stack.size(), context.uc_link = nullptr;
        makecontext(&context, run_fiber, 0);
        fiber.place.is_fresh = true;
    }
    for (;;) {
        bool any_ran = false, all_ended = true;
        std::shuffle(turns.begin(), turns.end(), order);
        for (unsigned turn : turns) {
            if (fibers[turn].state == State::READY) {
                running = &fibers[turn], any_ran = true;
                go(scheduler, running->place);
            }
            all_ended = all_ended && fibers[turn].state == State::ENDED;
        }
        if (all_ended)
            return;
        for (unsigned first = 0; first < threads; first += WARP_LANES)
            any_ran = release(first, threads) || any_ran;
        if (!any_ran)
            fail("lanes wait for lanes that ended or wait for others");
    }
}

template <class T> T hand_over(unsigned mask, T number, int source)
{
    running->handed_over = 0;
    memcpy(&running->handed_over, &number, sizeof number);
    wait_for(mask);
    if (!(mask >> source & 1))
        fail("a shuffle reads a lane that does not take part");
    memcpy(&number, &lane(source).handed_over, sizeof number);
    wait_for(mask); /* nobody writes before all have read */
    return number;
}

} // namespace emulation

#define threadIdx (emulation::running->thread)
#define blockIdx (emulation::block)

/* ------------------------------------------------------------------------------------------------------------- device */

alignas(16) unsigned char shared_memory[emulation::MAX_SHARED_BYTES];

/* Does nothing if EMULATION_WITHOUT_BARRIERS is defined: a test shows so that it would notice a missing barrier. */
inline void __syncwarp([[maybe_unused]] unsigned mask = 0xffffffff)
{
#if !defined(EMULATION_WITHOUT_BARRIERS)
    emulation::wait_for(mask);
#endif
}

template <class T> T __shfl_xor_sync(unsigned mask, T number, int distance)
{
    return emulation::hand_over(mask, number, (int)(threadIdx.x % emulation::WARP_LANES) ^ distance);
}

template <class T> T __ldg(const T *address) { return *address; }
template <class T> void __stcs(T *address, T number) { *address = number; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __uint_as_float(unsigned bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}
template <class T> void atomicAdd(T *sum, T number) { *sum += number; }
inline void atomicAdd(float2 *sum, float2 numbers) { sum->x += numbers.x, sum->y += numbers.y; }
inline void atomicAdd(float4 *sum, float4 numbers)
{
    sum->x += numbers.x, sum->y += numbers.y, sum->z += numbers.z, sum->w += numbers.w;
}

/* --------------------------------------------------------------------------------------------------------------- host */

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
struct CUstream_st;
typedef CUstream_st *cudaStream_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

/* What tests ask for after a call. */
struct EmulationLog {
    int32_t device, launches, device_of_launch;
    void *stream_of_launch;
};
inline EmulationLog emulation_log_;
extern "C" EmulationLog *emulation_log() { return &emulation_log_; }

constexpr int EMULATED_DEVICES = 2;

inline cudaError_t cudaGetDevice(int *device)
{
    *device = emulation_log_.device;
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= EMULATED_DEVICES)
        return cudaErrorInvalidDevice;
    emulation_log_.device = device;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "another error";
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...), Arguments... arguments)
{
    const dim3 grid = config->gridDim;
    if (config->dynamicSmemBytes > emulation::MAX_SHARED_BYTES)
        return cudaErrorInvalidValue;
    if (!grid.x || !grid.y || grid.x > INT32_MAX || grid.y > 65535 || grid.z != 1 ||
        config->blockDim.x > emulation::MAX_THREADS)
        return cudaErrorInvalidConfiguration;
    emulation_log_.launches++;
    emulation_log_.device_of_launch = emulation_log_.device, emulation_log_.stream_of_launch = config->stream;
    emulation::kernel = [=] { kernel(arguments...); };
    EMULATION_FORBID(shared_memory + config->dynamicSmemBytes, sizeof shared_memory - config->dynamicSmemBytes);
    for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) {
            emulation::block = dim3(x, y, 0);
            memset(shared_memory, 0xff, config->dynamicSmemBytes);
            emulation::run_block(config->blockDim.x);
        }
    EMULATION_ALLOW(shared_memory, sizeof shared_memory);
    return cudaSuccess;
}

#endif
