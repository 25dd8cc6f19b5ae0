// torch built without CUDA has nothing that switches devices, so that even slicing a tensor "on a GPU" fails.
// This guard switches nothing. See pretend_gpu.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using NothingToSwitch = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, NothingToSwitch);
