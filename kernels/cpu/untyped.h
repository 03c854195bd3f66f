/* Ends an element type, so that the next one can begin. */
#undef FN
#undef T
#undef GROUP
#undef VG
#undef LDG
#undef SETG
#undef DOT
#undef LD
#undef LDN
#undef STN
#undef RND
