/* bitween._core: the method table and nothing else. */
#define BW_IMPORTS_NUMPY
#include "boundary.h"

#define VERB(name) {#name, (PyCFunction)(void (*)(void))bw_py_##name, METH_FASTCALL | METH_KEYWORDS, bw_doc_##name},
static PyMethodDef methods[] = {
#include "verbs.h"
    {NULL, NULL, 0, NULL}};
#undef VERB

static int execute(PyObject *module) {
    import_array1(-1);
    bw_on_interrupt(bw_ask_signals);
    if (PyModule_AddIntConstant(module, "FEW_TOKENS", BW_FEW_TOKENS)) return -1;
    return PyModule_AddIntConstant(module, "MOST_TOGETHER", BW_MOST_TOGETHER);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                                 .m_name = "bitween._core",
                                 .m_doc = "bitween's C core; use the functions of the package bitween.",
                                 .m_methods = methods,
                                 .m_slots = slots};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&definition);
}
