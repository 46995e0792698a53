// A stand-in for libamdhip64: the functions that inductor_ext/kernels/hip/runtime.py calls, with the kernels linked in,
// compiled for the CPU. It checks what the real one checks, keeps a record of every call, and runs the kernel.
#include "prelude.h"

#include <elf.h>
#include <string.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

enum Error {
    Success = 0,
    InvalidValue = 1,
    InvalidConfiguration = 9,
    InvalidDevice = 101,
    InvalidImage = 200,
    InvalidContext = 201,
    InvalidHandle = 400,
    NotFound = 500,
    LaunchFailure = 719,
};

const std::map<int, std::string> words = {
    {Success, "no error"},
    {InvalidValue, "invalid argument"},
    {InvalidConfiguration, "invalid configuration argument"},
    {InvalidDevice, "invalid device ordinal"},
    {InvalidImage, "device kernel image is invalid"},
    {InvalidContext, "invalid device context"},
    {InvalidHandle, "invalid resource handle"},
    {NotFound, "named symbol not found"},
    {LaunchFailure, "unspecified launch failure"},
};

constexpr int DEVICES = 2;

struct Module {
    int device;
    std::string image;
};

struct Function {
    const Module* module;
    const lanes::Kernel* kernel;
};

// As ctypes reads it (tests/hip_lanes.py).
struct Call {
    const char* what;
    const char* name;    // of the kernel
    const void* data;    // the image, or the kernel's argument
    size_t bytes;        // of the data
    void* stream;
    uint32_t grid[3];
    uint32_t threads;
    uint32_t shared;
    int32_t device;
};

int device = 0;
int failure = Success;  // what the next call returns
uint64_t seed = 0;
std::string complaint;  // of the lanes, about the last launch
std::vector<std::unique_ptr<Module>> modules;
std::vector<std::unique_ptr<Function>> functions;
std::vector<std::unique_ptr<std::string>> kept;  // what calls point to
std::vector<Call> calls;

const char* keep(const void* data, size_t bytes) {
    kept.push_back(std::make_unique<std::string>(static_cast<const char*>(data), bytes));
    return kept.back()->data();
}

Call& record(const char* what) {
    calls.push_back({});
    calls.back().what = what;
    calls.back().name = "";
    calls.back().device = device;
    return calls.back();
}

int taken_failure() {
    const int now = failure;
    failure = Success;
    return now;
}

// The size of an ELF file for AMD GPUs, whose table of sections comes last; 0 if it is none.
size_t image_bytes(const void* image) {
    const auto& header = *static_cast<const Elf64_Ehdr*>(image);
    constexpr int AMDGPU = 224;
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_machine != AMDGPU) return 0;
    return header.e_shoff + size_t(header.e_shentsize) * header.e_shnum;
}

}  // namespace

extern "C" {

const char* hipGetErrorString(int error) {
    static std::string said;
    const auto known = words.find(error);
    said = known == words.end() ? "unknown error" : known->second;
    if (error == LaunchFailure && !complaint.empty()) said += ": " + complaint;
    return said.c_str();
}

int hipGetDevice(int* index) {
    *index = device;
    return Success;
}

int hipSetDevice(int index) {
    record("hipSetDevice").device = index;
    if (const int error = taken_failure()) return error;
    if (index < 0 || index >= DEVICES) return InvalidDevice;
    device = index;
    return Success;
}

int hipModuleLoadData(void** module, const void* image) {
    const size_t bytes = image_bytes(image);
    Call& call = record("hipModuleLoadData");
    call.bytes = bytes;
    if (const int error = taken_failure()) return error;
    if (bytes == 0) return InvalidImage;
    modules.push_back(std::make_unique<Module>(Module{device, std::string(static_cast<const char*>(image), bytes)}));
    call.data = modules.back()->image.data();
    *module = modules.back().get();
    return Success;
}

// A kernel is found if the code object has its descriptor, and runs if it was compiled for the CPU too.
int hipModuleGetFunction(void** function, void* module, const char* name) {
    record("hipModuleGetFunction").name = keep(name, strlen(name) + 1);
    if (const int error = taken_failure()) return error;
    const auto* loaded = static_cast<const Module*>(module);
    const std::string descriptor = std::string(1, '\0') + name + ".kd" + std::string(1, '\0');
    if (loaded->image.find(descriptor) == std::string::npos) return NotFound;
    for (const lanes::Kernel& kernel : lanes::kernels())
        if (kernel.name == name) {
            functions.push_back(std::make_unique<Function>(Function{loaded, &kernel}));
            *function = functions.back().get();
            return Success;
        }
    return NotFound;
}

int hipModuleLaunchKernel(void* function, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t block_x,
                          uint32_t block_y, uint32_t block_z, uint32_t shared, void* stream, void** params, void** extra) {
    const auto& launched = *static_cast<const Function*>(function);
    const uint32_t grid[3] = {grid_x, grid_y, grid_z};
    Call& call = record("hipModuleLaunchKernel");
    call.name = launched.kernel->name.c_str();
    memcpy(call.grid, grid, sizeof grid);
    call.threads = block_x;
    call.shared = shared;
    call.stream = stream;
    if (params != nullptr || extra == nullptr || extra[0] != reinterpret_cast<void*>(1) ||
        extra[2] != reinterpret_cast<void*>(2) || extra[4] != reinterpret_cast<void*>(3))
        return InvalidValue;
    call.bytes = *static_cast<const size_t*>(extra[3]);
    call.data = keep(extra[1], call.bytes);
    if (const int error = taken_failure()) return error;
    if (launched.module->device != device) return InvalidContext;
    if (call.bytes != launched.kernel->kernarg_bytes) return InvalidValue;
    // The hardware counts the threads of each dimension in 32 bits.
    if (uint64_t(grid_x) * block_x > UINT32_MAX || grid_x == 0 || grid_y == 0 || grid_z == 0 || block_y != 1 ||
        block_z != 1)
        return InvalidConfiguration;
    complaint = lanes::run(*launched.kernel, grid, block_x, call.data, seed++);
    return complaint.empty() ? Success : LaunchFailure;
}

// What the tests ask for.
size_t lanes_calls() { return calls.size(); }
const Call* lanes_call(size_t i) { return &calls[i]; }
void lanes_fail_next(int error) { failure = error; }
void lanes_seed(uint64_t start) { seed = start; }

}  // extern "C"
