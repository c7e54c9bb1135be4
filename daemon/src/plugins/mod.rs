//! Plugin host processes: deadlines, restarts, quarantine.
