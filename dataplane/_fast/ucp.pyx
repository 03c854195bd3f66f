# cython: language_level=3, boundscheck=False, wraparound=False
"""libucp for one asyncio loop: a worker, its listener and its endpoints, in one thread.

Nothing here waits. The loop watches `Worker.fd`; when it is readable, or soon after the handler's `on_work`
was called, it calls `Worker.poll`, which makes progress, delivers events to the handler and arms the
descriptor again. C callbacks only queue events: a handler never runs inside libucp, and an exception never
crosses C (it is kept and raised by the next `poll`).

Messages travel as eager fragments that fit one libucp segment, cut and joined here. libucp's own ways for
large messages are not used: its eager reassembly copies twice, its rendezvous is slower over TCP, and libucp
1.21 crashes (ucp_proto_rndv_rts_abort) if a peer dies under a pending rendezvous while memory hooks are off.
"""

from collections import deque

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from .sockaddr cimport fill_sockaddr, ntohs, sockaddr, sockaddr_in, sockaddr_storage


cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    AM_ID = 1
    HEADER_MAX = 64
    # Payload of one fragment; TCP_TX_SEG_SIZE and TCP_RX_SEG_SIZE must hold it and the headers.
    FRAGMENT = 256 << 10
    # Up to here copying the parts into one buffer is cheaper than handing libucp a vector.
    GATHER_MAX = 4096

cdef enum:
    EVENT_CONNECTION
    EVENT_MESSAGE
    EVENT_FAILED


class UcpError(OSError):
    """A libucp call was refused; the message names the call and libucp's reason."""


cdef int _check(str what, ucs_status_t status) except -1:
    if status != UCS_OK:
        raise UcpError(f"{what}: {ucs_status_string(status).decode()}")
    return 0


cdef double _now() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return ts.tv_sec + ts.tv_nsec * 1e-9


def set_log_level(str level):
    """Sets what libucp prints (to standard output): `fatal`, `error`, `warn`, `diag`, `info`, ..."""
    _check("log level", ucs_global_opts_set_value(b"LOG_LEVEL", level.encode()))


cdef void _release(Outgoing *out) noexcept:
    cdef Py_ssize_t i
    for i in range(out.views_len):
        PyBuffer_Release(&out.views[i])
    free(out.views)
    free(out.iov)
    free(out.headers)
    free(out.gathered)
    free(out)


cdef void *_allocate(size_t count, size_t size) except NULL:
    cdef void *memory = calloc(count + 1, size)
    if memory == NULL:
        raise MemoryError
    return memory


cdef Outgoing *_outgoing(parts, const char *header, size_t header_length) except NULL:
    """Pins the parts and lays out the headers of the fragments; see GATHER_MAX."""
    cdef Outgoing *out = <Outgoing *>_allocate(1, sizeof(Outgoing))
    cdef Py_ssize_t i, count = len(parts)
    cdef size_t at = 0, fragments
    try:
        out.views = <Py_buffer *>_allocate(count, sizeof(Py_buffer))
        for part in parts[:count]:
            PyObject_GetBuffer(part, &out.views[out.views_len], PyBUF_SIMPLE)
            out.length += <size_t>out.views[out.views_len].len
            out.views_len += 1
        fragments = max(<size_t>1, (out.length + FRAGMENT - 1) // FRAGMENT)
        out.headers = <char *>_allocate(fragments, sizeof(Prefix) + header_length)
        memcpy(out.headers + sizeof(Prefix), header, header_length)
        if out.views_len > 1 and out.length <= GATHER_MAX:
            out.gathered = <char *>_allocate(out.length, 1)
            for i in range(out.views_len):
                memcpy(out.gathered + at, out.views[i].buf, out.views[i].len)
                at += <size_t>out.views[i].len
        elif out.views_len > 1:
            # A piece ends where a view or a fragment ends.
            out.iov = <ucp_dt_iov_t *>_allocate(<size_t>out.views_len + fragments, sizeof(ucp_dt_iov_t))
    except BaseException:
        _release(out)
        raise
    return out


cdef void _complete(Outgoing *out) noexcept:
    cdef Endpoint endpoint
    out.pending -= 1
    if out.pending == 0:
        endpoint = <Endpoint>out.endpoint
        endpoint.queued_bytes -= <long long>out.length
        _release(out)
        Py_DECREF(endpoint)


cdef void _on_sent(void *request, ucs_status_t status, void *user_data) noexcept with gil:
    # A failed send needs no event of its own: the endpoint's error handler reports the cause.
    _complete(<Outgoing *>user_data)
    ucp_request_free(request)


cdef void _on_closed(void *request, ucs_status_t status, void *user_data) noexcept with gil:
    cdef Endpoint endpoint = <Endpoint>user_data
    endpoint._forget()
    ucp_request_free(request)
    Py_DECREF(endpoint)


cdef void _on_error(void *arg, ucp_ep_h ep, ucs_status_t status) noexcept with gil:
    cdef Endpoint endpoint = <Endpoint>arg
    try:
        endpoint._fail(ucs_status_string(status).decode())
    except BaseException as error:
        endpoint._owner._fault = error


cdef void _on_connection(ucp_conn_request_h request, void *arg) noexcept with gil:
    cdef Worker worker = <Worker>arg
    try:
        worker._requests.append(<uintptr_t>request)
        worker._events.append((EVENT_CONNECTION, <uintptr_t>request, None, None))
    except BaseException as error:
        worker._fault = error


cdef ucs_status_t _on_message(
        void *arg, const void *header, size_t header_length, void *data, size_t length,
        const ucp_am_recv_param_t *param) noexcept with gil:
    cdef Worker worker = <Worker>arg
    try:
        worker._arrived(<const char *>header, header_length, <const char *>data, length, param)
    except BaseException as error:
        worker._fault = error
    return UCS_OK


cdef class Worker:
    """One libucp context and worker. `handler` has `on_connection(request: int)`,
    `on_message(endpoint, header: bytes, data: memoryview)` and `on_failed(endpoint, reason: str)`,
    called from `poll` only, and `on_work()`, called from everything else that leaves work for `poll`.
    Messages of one endpoint are delivered in the order they were sent.

    Raises UcpError if libucp refuses an option or has no transport.
    """

    def __cinit__(self, handler, dict options):
        cdef ucp_config_t *config = NULL
        cdef ucp_params_t params
        cdef ucp_worker_params_t worker_params
        cdef ucp_am_handler_param_t am
        self._handler = handler
        self._events = deque()
        self._requests = []
        self._endpoints = {}
        self.fd = -1
        _check("ucp_config_read", ucp_config_read(NULL, NULL, &config))
        try:
            for name, value in options.items():
                _check(f"option {name}={value}", ucp_config_modify(config, name.encode(), value.encode()))
            memset(&params, 0, sizeof(params))
            params.field_mask = UCP_PARAM_FIELD_FEATURES
            params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP
            _check("ucp_init", ucp_init(&params, config, &self._context))
        finally:
            ucp_config_release(config)
        memset(&worker_params, 0, sizeof(worker_params))
        worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE
        worker_params.thread_mode = UCS_THREAD_MODE_SINGLE
        _check("ucp_worker_create", ucp_worker_create(self._context, &worker_params, &self._worker))
        _check("ucp_worker_get_efd", ucp_worker_get_efd(self._worker, &self.fd))
        memset(&am, 0, sizeof(am))
        am.field_mask = (UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                         | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG)
        am.id = AM_ID
        am.flags = UCP_AM_FLAG_WHOLE_MSG
        am.cb = _on_message
        am.arg = <void *>self
        _check("ucp_worker_set_am_recv_handler", ucp_worker_set_am_recv_handler(self._worker, &am))

    def __dealloc__(self):
        # Endpoints keep their worker alive, so none is left here.
        if self._listener != NULL:
            ucp_listener_destroy(self._listener)
        if self._worker != NULL:
            ucp_worker_destroy(self._worker)
        if self._context != NULL:
            ucp_cleanup(self._context)

    def listen(self, str host, int port):
        """Listens on a numeric address; port 0 takes a free one. Returns the port. Raises UcpError."""
        cdef sockaddr_storage address
        cdef ucp_listener_params_t params
        cdef ucp_listener_attr_t attr
        memset(&params, 0, sizeof(params))
        params.sockaddr.addrlen = fill_sockaddr(host, port, &address)
        params.sockaddr.addr = <const sockaddr *>&address
        params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER
        params.conn_handler.cb = _on_connection
        params.conn_handler.arg = <void *>self
        _check(f"listen on {host}:{port}", ucp_listener_create(self._worker, &params, &self._listener))
        memset(&attr, 0, sizeof(attr))
        attr.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR
        _check("ucp_listener_query", ucp_listener_query(self._listener, &attr))
        return ntohs((<sockaddr_in *>&attr.sockaddr).sin_port)

    def connect(self, str host, int port):
        """Begins to open an endpoint to a listener; failure arrives as `on_failed`.
        Raises UcpError, ValueError."""
        cdef sockaddr_storage address
        cdef ucp_ep_params_t params
        memset(&params, 0, sizeof(params))
        params.sockaddr.addrlen = fill_sockaddr(host, port, &address)
        params.sockaddr.addr = <const sockaddr *>&address
        params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER
        params.field_mask = UCP_EP_PARAM_FIELD_SOCK_ADDR | UCP_EP_PARAM_FIELD_FLAGS
        return self._open(&params)

    def accept(self, request):
        """Opens the endpoint of a connection request given to `on_connection`. Raises UcpError."""
        cdef ucp_ep_params_t params
        self._requests.remove(request)
        memset(&params, 0, sizeof(params))
        params.conn_request = <ucp_conn_request_h><uintptr_t>request
        params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST
        return self._open(&params)

    def reject(self, request):
        """Refuses a connection request given to `on_connection`."""
        self._requests.remove(request)
        _check("ucp_listener_reject",
               ucp_listener_reject(self._listener, <ucp_conn_request_h><uintptr_t>request))

    cdef Endpoint _open(self, ucp_ep_params_t *params):
        cdef Endpoint endpoint = Endpoint.__new__(Endpoint)
        endpoint._owner = self
        params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER
        params.err_mode = UCP_ERR_HANDLING_MODE_PEER
        params.err_handler.cb = _on_error
        params.err_handler.arg = <void *>endpoint
        _check("ucp_ep_create", ucp_ep_create(self._worker, params, &endpoint._ep))
        endpoint.open = True
        # libucp holds a bare pointer to the endpoint until its close completes (_on_closed).
        Py_INCREF(endpoint)
        self._endpoints[<uintptr_t>endpoint._ep] = endpoint
        self._handler.on_work()
        return endpoint

    cdef int _arrived(
            self, const char *header, size_t header_length, const char *data, size_t length,
            const ucp_am_recv_param_t *param) except -1:
        cdef Endpoint endpoint = None
        if param.recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP:
            endpoint = self._endpoints.get(<uintptr_t>param.reply_ep)
        if endpoint is None or not endpoint.open:
            self.strays += 1
        elif header_length < sizeof(Prefix) or param.recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV:
            endpoint._fail("not a fragment")
        else:
            endpoint._join(header, header_length, data, length)
        return 0

    cdef int _dispatch(self) except -1:
        cdef int kind
        while self._events:
            kind, subject, header, data = self._events.popleft()
            if kind == EVENT_MESSAGE:
                if not (<Endpoint>subject)._closing:
                    self._handler.on_message(subject, header, data)
            elif kind == EVENT_FAILED:
                if not (<Endpoint>subject)._closing:
                    (<Endpoint>subject).close()
                    self._handler.on_failed(subject, header)
            else:
                self._handler.on_connection(subject)
        return 0

    def poll(self, double budget_s):
        """Makes progress and delivers events until nothing is left or `budget_s` seconds are used up.
        True: the descriptor is armed, wait for it; False: there is more to do, call again soon."""
        cdef double deadline = _now() + budget_s
        cdef unsigned moved
        cdef ucs_status_t status
        while True:
            moved = ucp_worker_progress(self._worker)
            if self._fault is not None:
                fault, self._fault = self._fault, None
                raise fault
            if self._events:
                self._dispatch()
                moved += 1
            if moved == 0:
                status = ucp_worker_arm(self._worker)
                if status == UCS_OK:
                    return True
                if status != UCS_ERR_BUSY:
                    _check("ucp_worker_arm", status)
            if _now() > deadline:
                return False

    def close(self, double deadline_s=1.0):
        """Closes everything; events not yet delivered are dropped. Takes at most about `deadline_s`."""
        cdef double deadline = _now() + deadline_s
        if self._worker == NULL:
            return
        for request in list(self._requests):
            self.reject(request)
        if self._listener != NULL:
            ucp_listener_destroy(self._listener)
            self._listener = NULL
        for endpoint in list(self._endpoints.values()):
            endpoint.close()
        while self._endpoints and _now() < deadline:
            ucp_worker_progress(self._worker)
        self._events.clear()
        self.fd = -1
        if self._endpoints:
            # Destroying a worker under a live endpoint is undefined: leaking it is the lesser evil.
            self._worker = NULL
            self._context = NULL
            raise UcpError(f"{len(self._endpoints)} endpoints did not close in {deadline_s} s")
        ucp_worker_destroy(self._worker)
        self._worker = NULL
        ucp_cleanup(self._context)
        self._context = NULL


cdef class Endpoint:
    """One connection. `open` turns False once, at `close` or failure; `queued_bytes` are the bytes given to
    `send` that libucp still holds; a message over `limit_bytes` fails the endpoint; `user` is the caller's.
    """

    def __init__(self):
        raise TypeError("use Worker.connect or Worker.accept")

    def send(self, bytes header, parts):
        """Sends the concatenation of `parts` (C-contiguous buffers, kept alive and not to be changed until
        sent) after `header` (at most 64 bytes). Never blocks. False: the endpoint is not open, or failed now.
        Raises BufferError, TypeError, ValueError, MemoryError; then nothing was sent."""
        cdef Outgoing *out
        cdef size_t header_length = <size_t>PyBytes_GET_SIZE(header)
        cdef ucs_status_t status
        if not self.open:
            return False
        if header_length > HEADER_MAX:
            raise ValueError("header too long")
        out = _outgoing(parts, PyBytes_AS_STRING(header), header_length)
        out.endpoint = <void *>self
        out.pending = 1
        Py_INCREF(self)
        self.queued_bytes += <long long>out.length
        status = self._hand_over(out, header_length)
        _complete(out)
        if status != UCS_OK:
            # The message may have begun: what followed would be joined wrongly.
            self._fail(ucs_status_string(status).decode())
            self._owner._handler.on_work()
            return False
        if self.queued_bytes > 0:
            # What went out at once needs no progress: a wake-up of the worker costs more than a small message.
            self._owner._handler.on_work()
        return True

    cdef ucs_status_t _hand_over(self, Outgoing *out, size_t header_length) noexcept:
        """Gives all fragments to libucp, which sends or queues them in this order."""
        cdef ucp_request_param_t param
        cdef ucs_status_ptr_t request
        cdef ucp_dt_iov_t *iov = out.iov
        cdef char *header = out.headers
        cdef const char *flat = out.gathered
        cdef Py_ssize_t view = 0
        cdef size_t in_view = 0, offset = 0, length, piece, wanted, count
        if flat == NULL and out.views_len == 1:
            flat = <const char *>out.views[0].buf
        memset(&param, 0, sizeof(param))
        param.op_attr_mask = (UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA
                              | UCP_OP_ATTR_FIELD_FLAGS)
        param.flags = UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER
        param.cb.send = _on_sent
        param.user_data = <void *>out
        if flat == NULL and out.views_len > 0:
            param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE
            param.datatype = UCP_DATATYPE_IOV
        while True:
            length = min(out.length - offset, <size_t>FRAGMENT)
            (<Prefix *>header).total = out.length
            (<Prefix *>header).offset = offset
            out.pending += 1
            if flat != NULL or out.views_len == 0:
                request = ucp_am_send_nbx(
                    self._ep, AM_ID, header, sizeof(Prefix) + header_length, flat + offset if flat else NULL,
                    length, &param)
            else:
                wanted, count = length, 0
                while wanted > 0:
                    piece = min(wanted, <size_t>out.views[view].len - in_view)
                    if piece > 0:
                        iov[count].buffer = <char *>out.views[view].buf + in_view
                        iov[count].length = piece
                        count += 1
                    wanted -= piece
                    in_view += piece
                    if in_view == <size_t>out.views[view].len:
                        view += 1
                        in_view = 0
                request = ucp_am_send_nbx(
                    self._ep, AM_ID, header, sizeof(Prefix) + header_length, iov, count, &param)
                iov += count
            if request == NULL or UCS_PTR_IS_ERR(request):
                out.pending -= 1  # never the last: the caller holds one
                if request != NULL:
                    return UCS_PTR_STATUS(request)
            header += sizeof(Prefix) + (header_length if offset == 0 else 0)
            header_length = 0
            offset += length
            if offset >= out.length:
                return UCS_OK

    def close(self):
        """Drops the connection and what is queued on it, now. Idempotent; no event follows."""
        cdef ucp_request_param_t param
        cdef ucs_status_ptr_t request
        if self._closing:
            return
        self.open = False
        self._closing = True
        memset(&param, 0, sizeof(param))
        param.op_attr_mask = (UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK
                              | UCP_OP_ATTR_FIELD_USER_DATA)
        param.flags = UCP_EP_CLOSE_FLAG_FORCE
        param.cb.send = _on_closed
        param.user_data = <void *>self
        request = ucp_ep_close_nbx(self._ep, &param)
        self._owner._handler.on_work()
        if request == NULL or UCS_PTR_IS_ERR(request):
            self._forget()
            Py_DECREF(self)

    cdef int _forget(self) except -1:
        # The handle may already belong to a newer endpoint.
        if self._owner._endpoints.get(<uintptr_t>self._ep) is self:
            del self._owner._endpoints[<uintptr_t>self._ep]
        return 0

    cdef int _fail(self, str reason) except -1:
        if self.open:
            self.open = False
            self._owner._events.append((EVENT_FAILED, self, reason, None))
        return 0

    cdef int _join(self, const char *header, size_t header_length, const char *data, size_t length) except -1:
        """Takes the next fragment; queues the event of a message that is complete."""
        cdef Prefix prefix
        memcpy(&prefix, header, sizeof(Prefix))
        if prefix.offset == 0:
            if self._partial is not None:
                return self._fail("a message began before the last one ended")
            if <long long>prefix.total > self.limit_bytes or prefix.total > <uint64_t>PY_SSIZE_T_MAX:
                return self._fail(
                    f"a message of {prefix.total} bytes is over the limit of {self.limit_bytes}")
            self._header = PyBytes_FromStringAndSize(
                header + sizeof(Prefix), <Py_ssize_t>(header_length - sizeof(Prefix)))
            self._partial = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>prefix.total)
            self._filled = 0
        if (self._partial is None or prefix.offset != self._filled
                or prefix.total != <uint64_t>len(self._partial) or length > prefix.total - prefix.offset):
            return self._fail("a fragment out of place")
        memcpy(PyByteArray_AS_STRING(self._partial) + prefix.offset, data, length)
        self._filled += length
        if self._filled == prefix.total:
            self._owner._events.append((EVENT_MESSAGE, self, self._header, memoryview(self._partial)))
            self._partial = None
        return 0
