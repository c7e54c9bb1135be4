//! `doctor`: checks what Fermata needs and suggests fixes.
//!
//! Never starts a daemon and changes nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use fermata_protocol::daemon::{DaemonStatus, DaemonStatusResult, HelloResult, Role};
use fermata_protocol::plugin::{PluginList, PluginState};
use nix::unistd::{AccessFlags, access};
use serde::Serialize;

use crate::errors::{CommandError, CommandResult};
use crate::output::{Cell, Format, Paint, TextTable};
use crate::session::{DaemonSession, caller_environment};
use crate::units::bytes;
use crate::{autostart, connect};

/// With less free space, checkpoints are likely to be refused.
const MIN_FREE_BYTES: u64 = 1 << 30;

/// With a lower limit, large workspaces cannot be watched.
const MIN_WATCHES: u64 = 65_536;

/// The result of one check; the field names are those of the JSON output.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    good: bool,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, good: true, found: found.into(), hint: None }
    }

    fn bad(check: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { check, good: false, found: found.into(), hint: Some(hint.into()) }
    }
}

/// Exit code 1 when a check fails.
pub fn doctor(session: &mut DaemonSession) -> CommandResult {
    session.globals.no_autostart = true;
    let mut checks = Vec::new();
    let hello = check_connection(session, &mut checks);
    let status = match &hello {
        Some(hello) => {
            checks.push(version(hello));
            checks.push(role(hello));
            session.call(&DaemonStatus {}).ok()
        }
        None => {
            checks.push(installed());
            None
        }
    };
    if let Some(status) = &status {
        checks.push(freezer(status));
        checks.extend(plugins(session));
    }
    checks.extend(cgroup(status.as_ref().map(|s| s.pid)));
    checks.extend(state_dir(session, status.as_ref())?);
    checks.extend(watches());
    let id = |check: &Check| check.check;
    if session.out.format() == Format::Human {
        print_checks(session, &checks)?;
    } else {
        session.out.rows(&checks, "", id, |_, _| TextTable::new(&[]))?;
    }
    Ok(if checks.iter().all(|c| c.good) { 0 } else { 1 })
}

fn print_checks(session: &mut DaemonSession, checks: &[Check]) -> Result<(), CommandError> {
    let mut table = TextTable::new(&["CHECK", "STATE", "DETAIL"]);
    for check in checks {
        let state = if check.good { Cell::painted("ok", Paint::Good) } else { Cell::painted("failed", Paint::Bad) };
        table.row([check.check.into(), state, Cell::from(&check.found)]);
    }
    session.out.table(&table)?;
    for check in checks {
        if let Some(hint) = &check.hint {
            session.out.line(format_args!("hint ({}): {hint}", check.check))?;
        }
    }
    Ok(())
}

fn check_connection(session: &mut DaemonSession, checks: &mut Vec<Check>) -> Option<HelloResult> {
    const NAME: &str = "daemon";
    match session.hello() {
        Ok(hello) => {
            checks.push(Check::good(NAME, "answers"));
            Some(hello)
        }
        Err(CommandError::Reported(report)) => {
            let hint = "start it with 'fermatactl status' (as your user) or 'systemctl start fermatad'";
            checks.push(Check::bad(NAME, report.message, hint));
            None
        }
        Err(CommandError::OutputClosed) => None,
    }
}

fn installed() -> Check {
    match autostart::program() {
        Ok(path) => Check::good("fermatad", path.display().to_string()),
        Err(_) => Check::bad(
            "fermatad",
            "neither in the directory of fermatactl nor on PATH",
            "install it, so that commands can start it",
        ),
    }
}

fn version(hello: &HelloResult) -> Check {
    let own = env!("CARGO_PKG_VERSION");
    if hello.version == own {
        Check::good("versions", format!("client and daemon: {own}"))
    } else {
        Check::bad(
            "versions",
            format!("client: {own}, daemon: {}", hello.version),
            "restart the daemon after an upgrade; agents keep running",
        )
    }
}

fn role(hello: &HelloResult) -> Check {
    let found = hello.role.as_str();
    if hello.role == Role::Reader {
        Check::bad("role", found, "read access only; to run and pause agents, join the group fermata")
    } else {
        Check::good("role", found)
    }
}

fn freezer(status: &DaemonStatusResult) -> Check {
    if status.freezer.starts_with("cgroup") {
        Check::good("freezer", &status.freezer)
    } else {
        Check::bad(
            "freezer",
            &status.freezer,
            "agents are frozen by signals, which interrupt blocking system calls; give the daemon a writable cgroup v2 \
             (systemd: Delegate=yes, or run it in a user session)",
        )
    }
}

fn plugins(session: &mut DaemonSession) -> Option<Check> {
    let plugins = session.call(&PluginList {}).ok()?.plugins;
    let broken: Vec<String> = plugins
        .iter()
        .filter(|p| matches!(p.state, PluginState::Quarantined | PluginState::Failed))
        .map(|p| format!("{}: {}", p.name, p.last_error.as_deref().unwrap_or("failed")))
        .collect();
    Some(if broken.is_empty() {
        Check::good("plugins", format!("{} loaded", plugins.len()))
    } else {
        Check::bad("plugins", broken.join("; "), "fix it, then run: fermatactl plugin reload")
    })
}

/// Checks the cgroup of the daemon, or of this process when no daemon answers; `None` when the daemon runs as another
/// user, whose permissions this process does not have.
fn cgroup(daemon: Option<u32>) -> Option<Check> {
    const NAME: &str = "cgroup v2";
    let hint =
        "without it agents are frozen by signals; mount cgroup2, or run the daemon as root or in a delegated unit";
    let process = match daemon {
        None => "self".to_owned(),
        Some(pid) => {
            let owner = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
            if owner != nix::unistd::geteuid().as_raw() {
                return None;
            }
            pid.to_string()
        }
    };
    let Some(mount) = read("/proc/self/mountinfo").as_deref().and_then(cgroup2_mount) else {
        return Some(Check::bad(NAME, "not mounted", hint));
    };
    let own = read(&format!("/proc/{process}/cgroup")).and_then(|text| cgroup2_path(&text));
    let Some(own) = own else {
        return Some(Check::bad(NAME, "the process is not in a cgroup v2", hint));
    };
    let dir = mount.join(own.trim_start_matches('/'));
    let writable = |path: &Path| access(path, AccessFlags::W_OK).is_ok();
    Some(if writable(&dir) && writable(&dir.join("cgroup.procs")) {
        Check::good(NAME, format!("{} is writable", dir.display()))
    } else {
        Check::bad(NAME, format!("{} is not writable", dir.display()), hint)
    })
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// Finds the mount point of cgroup v2 in the text of mountinfo(5).
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next() != Some("cgroup2") {
            return None;
        }
        left.split(' ').nth(4).map(PathBuf::from)
    })
}

fn cgroup2_path(cgroups: &str) -> Option<String> {
    let line = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(line.to_owned())
}

fn state_dir(session: &DaemonSession, status: Option<&DaemonStatusResult>) -> Result<Vec<Check>, CommandError> {
    let dir = match status {
        Some(status) => PathBuf::from(&status.state_dir),
        None => connect::state_dir(&session.globals, &caller_environment())?,
    };
    let mut checks = Vec::new();
    const NAME: &str = "state directory";
    match fs::metadata(&dir) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 => checks.push(Check::bad(
            NAME,
            format!("{} is accessible to other users", dir.display()),
            format!("chmod 700 {}", dir.display()),
        )),
        Ok(found) => checks.push(Check::good(NAME, format!("{} (owner {})", dir.display(), found.uid()))),
        Err(_) if status.is_none() => {
            checks.push(Check::good(NAME, format!("{} (created by the first start)", dir.display())))
        }
        Err(error) => {
            checks.push(Check::bad(NAME, format!("{}: {error}", dir.display()), "check it as the user of the daemon"))
        }
    }
    checks.extend(free_space(&dir));
    Ok(checks)
}

/// Checks the file system of the nearest existing directory.
fn free_space(dir: &Path) -> Option<Check> {
    let existing = dir.ancestors().find(|path| path.exists())?;
    let system = nix::sys::statvfs::statvfs(existing).ok()?;
    let free = system.blocks_available().saturating_mul(system.fragment_size());
    let found = format!("{} at {}", bytes(free), existing.display());
    Some(if free >= MIN_FREE_BYTES {
        Check::good("free space", found)
    } else {
        Check::bad(
            "free space",
            found,
            format!("free some disk space: checkpoints need at least {}", bytes(MIN_FREE_BYTES)),
        )
    })
}

fn watches() -> Option<Check> {
    let text = read("/proc/sys/fs/inotify/max_user_watches")?;
    let limit: u64 = text.trim().parse().ok()?;
    let found = format!("{limit} per user");
    Some(if limit >= MIN_WATCHES {
        Check::good("inotify watches", found)
    } else {
        Check::bad(
            "inotify watches",
            found,
            "large workspaces are scanned completely instead; run: sysctl fs.inotify.max_user_watches=524288",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_v2_mount_is_found_on_unified_and_hybrid_machines() {
        let hybrid = "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("1 2 0:3 / / rw - ext4 /dev/x rw\n"), None);
        assert_eq!(cgroup2_path("1:cpu:/x\n0::/user.slice\n").as_deref(), Some("/user.slice"));
    }
}
