"""The part of libucp (UCX 1.21) that the transport uses, and the three objects built on it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from .sockaddr cimport sockaddr, sockaddr_storage, socklen_t


cdef extern from "ucs/config/global_opts.h" nogil:
    ctypedef int ucs_status_t
    ucs_status_t ucs_global_opts_set_value(const char *name, const char *value)


cdef extern from "ucp/api/ucp.h" nogil:
    ctypedef void *ucs_status_ptr_t
    ctypedef struct ucp_context:
        pass
    ctypedef struct ucp_config_t:
        pass
    ctypedef ucp_context *ucp_context_h
    ctypedef void *ucp_worker_h
    ctypedef void *ucp_ep_h
    ctypedef void *ucp_listener_h
    ctypedef void *ucp_conn_request_h
    ctypedef uint64_t ucp_datatype_t

    ucs_status_t UCS_OK
    ucs_status_t UCS_INPROGRESS
    ucs_status_t UCS_ERR_BUSY
    const char *ucs_status_string(ucs_status_t status)
    bint UCS_PTR_IS_ERR(ucs_status_ptr_t pointer)
    ucs_status_t UCS_PTR_STATUS(ucs_status_ptr_t pointer)

    ctypedef struct ucs_sock_addr_t:
        const sockaddr *addr
        socklen_t addrlen

    uint64_t UCP_PARAM_FIELD_FEATURES
    uint64_t UCP_FEATURE_AM
    uint64_t UCP_FEATURE_WAKEUP

    ctypedef struct ucp_params_t:
        uint64_t field_mask
        uint64_t features

    uint64_t UCP_WORKER_PARAM_FIELD_THREAD_MODE
    int UCS_THREAD_MODE_SINGLE

    ctypedef struct ucp_worker_params_t:
        uint64_t field_mask
        int thread_mode

    uint64_t UCP_LISTENER_PARAM_FIELD_SOCK_ADDR
    uint64_t UCP_LISTENER_PARAM_FIELD_CONN_HANDLER
    uint64_t UCP_LISTENER_ATTR_FIELD_SOCKADDR

    ctypedef void (*ucp_listener_conn_callback_t)(ucp_conn_request_h request, void *arg) noexcept
    ctypedef struct ucp_listener_conn_handler_t:
        ucp_listener_conn_callback_t cb
        void *arg
    ctypedef struct ucp_listener_params_t:
        uint64_t field_mask
        ucs_sock_addr_t sockaddr
        ucp_listener_conn_handler_t conn_handler
    ctypedef struct ucp_listener_attr_t:
        uint64_t field_mask
        sockaddr_storage sockaddr

    uint64_t UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
    uint64_t UCP_EP_PARAM_FIELD_ERR_HANDLER
    uint64_t UCP_EP_PARAM_FIELD_FLAGS
    uint64_t UCP_EP_PARAM_FIELD_SOCK_ADDR
    uint64_t UCP_EP_PARAM_FIELD_CONN_REQUEST
    unsigned UCP_EP_PARAMS_FLAGS_CLIENT_SERVER
    int UCP_ERR_HANDLING_MODE_PEER

    ctypedef void (*ucp_err_handler_cb_t)(void *arg, ucp_ep_h ep, ucs_status_t status) noexcept
    ctypedef struct ucp_err_handler_t:
        ucp_err_handler_cb_t cb
        void *arg
    ctypedef struct ucp_ep_params_t:
        uint64_t field_mask
        int err_mode
        ucp_err_handler_t err_handler
        unsigned flags
        ucs_sock_addr_t sockaddr
        ucp_conn_request_h conn_request

    uint32_t UCP_OP_ATTR_FIELD_CALLBACK
    uint32_t UCP_OP_ATTR_FIELD_USER_DATA
    uint32_t UCP_OP_ATTR_FIELD_DATATYPE
    uint32_t UCP_OP_ATTR_FIELD_FLAGS
    uint32_t UCP_AM_SEND_FLAG_REPLY
    uint32_t UCP_AM_SEND_FLAG_EAGER
    unsigned UCP_EP_CLOSE_FLAG_FORCE
    ucp_datatype_t UCP_DATATYPE_IOV

    ctypedef void (*ucp_send_nbx_callback_t)(void *request, ucs_status_t status, void *user_data) noexcept
    ctypedef union ucp_request_callback:
        ucp_send_nbx_callback_t send
    ctypedef struct ucp_request_param_t:
        uint32_t op_attr_mask
        uint32_t flags
        ucp_request_callback cb
        ucp_datatype_t datatype
        void *user_data
    ctypedef struct ucp_dt_iov_t:
        void *buffer
        size_t length

    uint64_t UCP_AM_HANDLER_PARAM_FIELD_ID
    uint64_t UCP_AM_HANDLER_PARAM_FIELD_FLAGS
    uint64_t UCP_AM_HANDLER_PARAM_FIELD_CB
    uint64_t UCP_AM_HANDLER_PARAM_FIELD_ARG
    uint32_t UCP_AM_FLAG_WHOLE_MSG
    uint64_t UCP_AM_RECV_ATTR_FIELD_REPLY_EP
    uint64_t UCP_AM_RECV_ATTR_FLAG_RNDV

    ctypedef struct ucp_am_recv_param_t:
        uint64_t recv_attr
        ucp_ep_h reply_ep
    ctypedef ucs_status_t (*ucp_am_recv_callback_t)(
        void *arg, const void *header, size_t header_length, void *data, size_t length,
        const ucp_am_recv_param_t *param) noexcept
    ctypedef struct ucp_am_handler_param_t:
        uint64_t field_mask
        unsigned id
        uint32_t flags
        ucp_am_recv_callback_t cb
        void *arg

    ucs_status_t ucp_config_read(const char *prefix, const char *file, ucp_config_t **config)
    ucs_status_t ucp_config_modify(ucp_config_t *config, const char *name, const char *value)
    void ucp_config_release(ucp_config_t *config)
    ucs_status_t ucp_init(const ucp_params_t *params, const ucp_config_t *config, ucp_context_h *context)
    void ucp_cleanup(ucp_context_h context)
    ucs_status_t ucp_worker_create(
        ucp_context_h context, const ucp_worker_params_t *params, ucp_worker_h *worker)
    void ucp_worker_destroy(ucp_worker_h worker)
    ucs_status_t ucp_worker_get_efd(ucp_worker_h worker, int *fd)
    unsigned ucp_worker_progress(ucp_worker_h worker)
    ucs_status_t ucp_worker_arm(ucp_worker_h worker)
    ucs_status_t ucp_worker_set_am_recv_handler(ucp_worker_h worker, const ucp_am_handler_param_t *param)
    ucs_status_t ucp_listener_create(
        ucp_worker_h worker, const ucp_listener_params_t *params, ucp_listener_h *listener)
    ucs_status_t ucp_listener_query(ucp_listener_h listener, ucp_listener_attr_t *attr)
    ucs_status_t ucp_listener_reject(ucp_listener_h listener, ucp_conn_request_h request)
    void ucp_listener_destroy(ucp_listener_h listener)
    ucs_status_t ucp_ep_create(ucp_worker_h worker, const ucp_ep_params_t *params, ucp_ep_h *ep)
    ucs_status_ptr_t ucp_ep_close_nbx(ucp_ep_h ep, const ucp_request_param_t *param)
    ucs_status_ptr_t ucp_am_send_nbx(
        ucp_ep_h ep, unsigned id, const void *header, size_t header_length, const void *buffer,
        size_t count, const ucp_request_param_t *param)
    void ucp_request_free(void *request)


cdef struct Prefix:
    # Begins the header of every fragment; the caller's header follows in the first one.
    uint64_t total
    uint64_t offset


cdef struct Outgoing:
    # One message on its way; lives until libucp no longer needs its memory.
    void *endpoint
    size_t length
    size_t pending              # fragments not yet completed, plus one while they are being handed over
    Py_ssize_t views_len
    Py_buffer *views
    ucp_dt_iov_t *iov           # room for every fragment's pieces, used one after the other
    char *headers
    char *gathered


cdef class Worker:
    cdef ucp_context_h _context
    cdef ucp_worker_h _worker
    cdef ucp_listener_h _listener
    cdef readonly int fd
    cdef readonly long strays
    cdef object _handler
    cdef object _events            # deque of tuples, oldest first
    cdef list _requests            # connection requests (as integers) not yet accepted or rejected
    cdef dict _endpoints           # handle as integer -> Endpoint, until its close has completed
    cdef object _fault             # an exception that could not pass through C; raised by the next poll

    cdef Endpoint _open(self, ucp_ep_params_t *params)
    cdef int _arrived(
        self, const char *header, size_t header_length, const char *data, size_t length,
        const ucp_am_recv_param_t *param) except -1
    cdef int _dispatch(self) except -1


cdef class Endpoint:
    cdef ucp_ep_h _ep
    cdef Worker _owner
    cdef readonly bint open
    cdef bint _closing
    cdef readonly long long queued_bytes
    cdef public long long limit_bytes
    cdef public object user
    cdef bytearray _partial        # the message that is arriving, its header, and how much of it is here
    cdef bytes _header
    cdef size_t _filled

    cdef int _forget(self) except -1
    cdef int _fail(self, str reason) except -1
    cdef int _join(self, const char *header, size_t header_length, const char *data, size_t length) except -1
    cdef ucs_status_t _hand_over(self, Outgoing *out, size_t header_length) noexcept
