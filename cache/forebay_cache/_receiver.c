/* A thread that receives into given memory, for `forebay_cache.service.receiver`: see there why.

   It never takes the GIL, nor touches anything of Python's. What it shares with the other side: a `receive_t` belongs to
   the thread from `receive` until it stands in `done`, but for `count`, which both may read; `done` has a lock.
   All else is used under the GIL. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <structmember.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS_MAX 16
#define STACK_SIZE (128 * 1024) /* the daemon may have all of its memory locked */

typedef struct receive {
    PyObject_HEAD
    Py_buffer view;
    int fd;
    Py_ssize_t least; /* bytes with which it is over */
    Py_ssize_t count; /* bytes that are there */
    struct receive *next_done;
    struct receive *before, *behind; /* neighbours among those that were begun and not taken */
} receive_t;

typedef struct {
    PyObject_HEAD
    int epoll_fd, event_fd, stop_fd;
    int is_running;
    pthread_t thread;
    pthread_mutex_t lock;
    receive_t *done, *begun;
} receiver_t;

/* --- on the thread */

static void finish(receiver_t *self, receive_t *one)
{
    const uint64_t told = 1;
    epoll_ctl(self->epoll_fd, EPOLL_CTL_DEL, one->fd, NULL);
    pthread_mutex_lock(&self->lock);
    one->next_done = self->done;
    self->done = one;
    pthread_mutex_unlock(&self->lock);
    /* It fails only if the counter is full: then the other side is awake. */
    if (write(self->event_fd, &told, sizeof told) < 0)
        return;
}

static void step(receiver_t *self, receive_t *one)
{
    const Py_ssize_t count = one->count;
    const ssize_t got = recv(one->fd, (char *)one->view.buf + count, (size_t)(one->view.len - count), MSG_DONTWAIT);
    if (got > 0)
        __atomic_store_n(&one->count, count + got, __ATOMIC_RELEASE);
    else if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0 || count + got >= one->least)
        finish(self, one);
}

static void *run(void *argument)
{
    receiver_t *const self = argument;
    struct epoll_event events[EVENTS_MAX];
    for (;;) {
        const int found = epoll_wait(self->epoll_fd, events, EVENTS_MAX, -1);
        for (int i = 0; i < found; i++) {
            if (events[i].data.ptr == NULL)
                return NULL;
            step(self, events[i].data.ptr);
        }
    }
}

/* --- under the GIL */

static void receive_dealloc(receive_t *self)
{
    PyBuffer_Release(&self->view);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *receive_count(receive_t *self, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(__atomic_load_n(&self->count, __ATOMIC_ACQUIRE));
}

static PyGetSetDef receive_fields[] = {{"count", (getter)receive_count, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyTypeObject receive_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "forebay_cache._receiver.Receive",
    .tp_basicsize = sizeof(receive_t),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)receive_dealloc,
    .tp_getset = receive_fields,
};

static int watch(receiver_t *self, int fd, void *whose)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = whose};
    return epoll_ctl(self->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void close_all(receiver_t *self)
{
    int *const fds[] = {&self->epoll_fd, &self->event_fd, &self->stop_fd};
    for (int i = 0; i < 3; i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}

/* Start the thread with all signals blocked: they are the other threads' matter. */
static int start(receiver_t *self)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    int error = pthread_attr_init(&attributes);
    if (error)
        return error;
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&self->thread, &attributes, run, self);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    self->is_running = error == 0;
    if (error == 0)
        pthread_setname_np(self->thread, "nbd-receive");
    return error;
}

static PyObject *receiver_new(PyTypeObject *type, PyObject *arguments, PyObject *names)
{
    if (PyTuple_GET_SIZE(arguments) || names != NULL) {
        PyErr_SetString(PyExc_TypeError, "Receiver takes no arguments");
        return NULL;
    }
    receiver_t *const self = (receiver_t *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    pthread_mutex_init(&self->lock, NULL);
    self->event_fd = self->stop_fd = -1;
    self->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (self->epoll_fd >= 0)
        self->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (self->event_fd >= 0)
        self->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = self->stop_fd < 0 || watch(self, self->stop_fd, NULL) < 0 ? errno : start(self);
    if (error == 0)
        return (PyObject *)self;
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    Py_DECREF(self);
    return NULL;
}

/* End the thread; what it did not finish stays as it is, and may be taken. */
static void stop(receiver_t *self)
{
    const uint64_t told = 1;
    if (!self->is_running)
        return;
    self->is_running = 0;
    if (write(self->stop_fd, &told, sizeof told) < 0)
        Py_FatalError("an eventfd of this process could not be written");
    Py_BEGIN_ALLOW_THREADS
    pthread_join(self->thread, NULL);
    Py_END_ALLOW_THREADS
}

static void leave(receiver_t *self, receive_t *one)
{
    *(one->before ? &one->before->behind : &self->begun) = one->behind;
    if (one->behind)
        one->behind->before = one->before;
}

static void receiver_dealloc(receiver_t *self)
{
    stop(self);
    close_all(self);
    while (self->begun) {
        receive_t *const one = self->begun;
        leave(self, one);
        Py_DECREF(one);
    }
    pthread_mutex_destroy(&self->lock);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *receiver_receive(receiver_t *self, PyObject *arguments)
{
    int fd;
    PyObject *memory;
    Py_ssize_t least;
    if (!PyArg_ParseTuple(arguments, "iOn", &fd, &memory, &least))
        return NULL;
    if (!self->is_running) {
        PyErr_SetString(PyExc_ValueError, "the receiver is closed");
        return NULL;
    }
    receive_t *const one = PyObject_New(receive_t, &receive_type);
    if (one == NULL)
        return NULL;
    one->fd = fd;
    one->least = least;
    one->count = 0;
    one->next_done = NULL;
    one->view.obj = NULL; /* of which a release is none */
    if (PyObject_GetBuffer(memory, &one->view, PyBUF_WRITABLE) < 0) {
        Py_DECREF(one);
        return NULL;
    }
    if (least <= 0 || least > one->view.len)
        PyErr_SetString(PyExc_ValueError, "the memory does not hold as much as is to be received");
    else if (watch(self, fd, one) < 0)
        PyErr_SetFromErrno(PyExc_OSError);
    if (PyErr_Occurred()) {
        Py_DECREF(one);
        return NULL;
    }
    one->before = NULL;
    one->behind = self->begun;
    if (self->begun)
        self->begun->before = one;
    self->begun = one;
    return Py_NewRef(one);
}

static PyObject *receiver_completions(receiver_t *self, PyObject *unused)
{
    (void)unused;
    PyObject *const found = PyList_New(0);
    if (found == NULL)
        return NULL;
    pthread_mutex_lock(&self->lock);
    receive_t *one = self->done;
    self->done = NULL;
    pthread_mutex_unlock(&self->lock);
    while (one) {
        receive_t *const next = one->next_done;
        const int failed = PyList_Append(found, (PyObject *)one) < 0;
        leave(self, one);
        PyBuffer_Release(&one->view);
        Py_DECREF(one);
        one = next;
        if (failed)
            PyErr_WriteUnraisable((PyObject *)self);
    }
    return found;
}

static PyObject *receiver_close(receiver_t *self, PyObject *unused)
{
    (void)unused;
    stop(self);
    return Py_NewRef(Py_None);
}

static PyMethodDef receiver_methods[] = {
    {"receive", (PyCFunction)receiver_receive, METH_VARARGS, NULL},
    {"completions", (PyCFunction)receiver_completions, METH_NOARGS, NULL},
    {"close", (PyCFunction)receiver_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef receiver_fields[] = {
    {"event_fd", T_INT, offsetof(receiver_t, event_fd), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject receiver_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "forebay_cache._receiver.Receiver",
    .tp_basicsize = sizeof(receiver_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = receiver_new,
    .tp_dealloc = (destructor)receiver_dealloc,
    .tp_methods = receiver_methods,
    .tp_members = receiver_fields,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "forebay_cache._receiver", .m_size = -1};

PyMODINIT_FUNC PyInit__receiver(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (PyModule_AddType(module, &receive_type) < 0 || PyModule_AddType(module, &receiver_type) < 0)
        Py_CLEAR(module);
    return module;
}
