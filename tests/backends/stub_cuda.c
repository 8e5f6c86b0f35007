/* A CUDA driver without a device: it takes what Triton's own driver module asks of libcuda, refuses what a real one
   would refuse of a launch or of a tensor map, counts launches, and starts nothing. Limits: CUDA driver API reference,
   cuTensorMapEncodeTiled; CUDA programming guide, technical specifications of compute capability 9.0. */
#include <cuda.h>
#include <string.h>

#define NAMES 64
#define SHARED (227 << 10)

static char names[NAMES][128];
static int launches[NAMES];
static int known = 0;

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "the stub driver refuses this value" : "an error of the stub driver";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDriverGetVersion(int *version) { return *version = 13020, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return *clusters = 66, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  int i = 0;
  while (i < known && strcmp(names[i], name))
    i++;
  if (i == NAMES)
    return CUDA_ERROR_OUT_OF_MEMORY;
  if (i == known)
    strncpy(names[known++], name, sizeof names[0] - 1);
  *function = (CUfunction)(size_t)(i + 1);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  int too_much = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > SHARED;
  return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  int bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  int span = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 256 * bytes : 16 << swizzle;
  int fits = rank == 2 && (size_t)address % 16 == 0 && box[0] * bytes % 16 == 0 && box[0] * bytes <= span;
  for (cuuint32_t i = 0; i < rank; i++)
    fits = fits && sizes[i] && sizes[i] <= 1ull << 32 && box[i] && box[i] <= 256 && steps[i] == 1;
  for (cuuint32_t i = 0; i + 1 < rank; i++)
    fits = fits && strides[i] % 16 == 0 && strides[i] < 1ull << 40 && strides[i] >= sizes[0] * bytes;
  memset(map, 0, sizeof *map);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (!config->gridDimX || config->gridDimX > 0x7fffffff || !config->gridDimY || config->gridDimY > 65535 ||
      config->gridDimZ != 1 || config->blockDimX > 1024 || config->sharedMemBytes > SHARED)
    return CUDA_ERROR_INVALID_VALUE;
  launches[(size_t)function - 1]++;
  return CUDA_SUCCESS;
}

/* For the test: the name and the launches of the i-th kernel, NULL behind the last. */
const char *stub_kernel(int i, int *count) { return i < known ? (*count = launches[i], names[i]) : NULL; }
void stub_reset(void) { memset(launches, 0, sizeof launches); }
