// autoregembed._native: what this build is. The CPU kernels join this module.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace {

const char* compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

PyObject* build_info(PyObject*, PyObject*) {
    return Py_BuildValue("{s:s,s:l}", "compiler", compiler(), "cplusplus", static_cast<long>(__cplusplus));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "The compiler and language version of this build."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
