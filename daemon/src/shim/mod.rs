//! The shim: parent and subreaper of one agent, which outlives the daemon.
