//! `run`: starts an agent with the environment, directory, umask and limits of the caller.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fermata_protocol::agent::{AgentRun, AgentView, ResourceLimit};
use fermata_protocol::budget::Budget;
use fermata_protocol::project::ProjectShow;
use fermata_protocol::supervision::{Hook, Supervision, TerminalSize};
use fermata_protocol::{Code, ProjectName};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::stat::{Mode, umask};

use super::arguments::target_of;
use super::{agents, logs};
use crate::agent_environment::inherited;
use crate::cli::RunArgs;
use crate::cli::values::split_words;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Format, note};
use crate::paths::{canonical, to_utf8};
use crate::raw_terminal;
use crate::session::DaemonSession;
use crate::units::millis;

pub fn run(session: &mut DaemonSession, args: RunArgs) -> CommandResult {
    let (wait, follow, attach) = (args.wait, args.logs, args.attach);
    let agent = start(session, args)?;
    let target = target_of(&agent);
    if attach {
        return super::attach::after_start(session, &target);
    }
    if (wait || follow) && session.out.is_human() {
        note(&format!("{target} started"));
    }
    if follow {
        logs::follow(session, &target)?;
    } else if !wait || session.out.format() == Format::Ids {
        session.out.object(&agent, Some(target.to_string()), |out, agent| match agent.pid {
            Some(pid) => out.line(format_args!("{target} started, pid {pid}")),
            None => out.line(format_args!("{target} is {}", agent.status)),
        })?;
        session.out.flush()?;
    }
    if !wait {
        return Ok(0);
    }
    let agent = agents::wait_for(session, &target, session.timeout_ms())?;
    if session.out.format() == Format::Json {
        session.out.json(&agent)?;
    }
    Ok(agents::exit_code(&agent))
}

fn start(session: &mut DaemonSession, args: RunArgs) -> Result<AgentView, CommandError> {
    let here = std::env::current_dir().map_err(|e| CommandError::io("find the current directory", &e))?;
    let (new_workspace, workspace) = match args.workspace.as_deref().map(canonical).transpose()? {
        Some(given) => (Some(given.clone()), given),
        None => workspace_of(session, &args.project, &here)?,
    };
    // By default the current directory if it is inside the workspace, else the workspace itself.
    let cwd = match &args.cwd {
        Some(dir) => Some(canonical(dir)?),
        None => Some(canonical(&here)?).filter(|here| here.starts_with(&workspace)),
    };
    let resume_argv = match args.resume_command {
        Some(line) => Some(words_of("--resume-command", &line)?),
        None => Some(args.resume_args).filter(|words| !words.is_empty()),
    };
    let argv = args
        .command
        .into_iter()
        .map(|word| {
            word.into_string().map_err(|word| {
                CommandError::usage(format!("the argument '{}' is not valid UTF-8", word.to_string_lossy()))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let params = AgentRun {
        project: args.project,
        workspace: new_workspace.as_deref().map(to_utf8).transpose()?,
        name: args.name,
        argv,
        env: inherited(std::env::vars_os()),
        cwd: cwd.as_deref().map(to_utf8).transpose()?,
        umask: Some(own_umask()),
        limits: own_limits(),
        resume_argv,
        profile: args.profile,
        stop_grace_ms: args.stop_grace.map(millis),
        supervision: Box::new(Supervision {
            pre_start: hook("--pre-start", args.hooks.pre_start, args.hooks.pre_start_timeout)?,
            post_stop: hook("--post-stop", args.hooks.post_stop, args.hooks.post_stop_timeout)?,
            terminal: args.tty.then(terminal_size),
            resources: args.resources.into(),
            budget: args.budget.apply(Budget::default()),
            ..args.supervision.settings()?
        }),
    };
    session.call(&params)
}

fn terminal_size() -> TerminalSize {
    raw_terminal::size().unwrap_or(TerminalSize { rows: 24, cols: 80 })
}

fn words_of(flag: &str, line: &str) -> Result<Vec<String>, CommandError> {
    let words = split_words(line).map_err(|e| CommandError::usage(format!("{flag}: {e}")))?;
    if words.is_empty() { Err(CommandError::usage(format!("{flag} is empty"))) } else { Ok(words) }
}

fn hook(flag: &str, line: Option<String>, timeout: Option<Duration>) -> Result<Option<Hook>, CommandError> {
    let Some(line) = line else { return Ok(None) };
    Ok(Some(Hook { argv: words_of(flag, &line)?, timeout_ms: timeout.map(millis) }))
}

/// Returns the workspace to create a new project with (`None` for an existing project), and the workspace that the
/// project has or will have.
fn workspace_of(
    session: &mut DaemonSession,
    project: &ProjectName,
    here: &Path,
) -> Result<(Option<PathBuf>, PathBuf), CommandError> {
    match session.call(&ProjectShow { project: project.clone() }) {
        Ok(detail) => Ok((None, PathBuf::from(detail.project.workspace))),
        Err(error) if error.is(Code::ProjectNotFound) => {
            let here = canonical(here)?;
            Ok((Some(here.clone()), here))
        }
        Err(error) => Err(error),
    }
}

/// Returns the umask. It can only be read by setting it, so no other thread may create files meanwhile.
pub fn own_umask() -> u32 {
    let mask = umask(Mode::from_bits_truncate(0o077));
    umask(mask);
    mask.bits()
}

/// Returns the resource limits of this process.
pub fn own_limits() -> BTreeMap<String, ResourceLimit> {
    const LIMITS: [(&str, Resource); 16] = [
        ("as", Resource::RLIMIT_AS),
        ("core", Resource::RLIMIT_CORE),
        ("cpu", Resource::RLIMIT_CPU),
        ("data", Resource::RLIMIT_DATA),
        ("fsize", Resource::RLIMIT_FSIZE),
        ("locks", Resource::RLIMIT_LOCKS),
        ("memlock", Resource::RLIMIT_MEMLOCK),
        ("msgqueue", Resource::RLIMIT_MSGQUEUE),
        ("nice", Resource::RLIMIT_NICE),
        ("nofile", Resource::RLIMIT_NOFILE),
        ("nproc", Resource::RLIMIT_NPROC),
        ("rss", Resource::RLIMIT_RSS),
        ("rtprio", Resource::RLIMIT_RTPRIO),
        ("rttime", Resource::RLIMIT_RTTIME),
        ("sigpending", Resource::RLIMIT_SIGPENDING),
        ("stack", Resource::RLIMIT_STACK),
    ];
    let bounded = |limit| (limit != RLIM_INFINITY).then_some(limit);
    let mut limits = BTreeMap::new();
    for (name, resource) in LIMITS {
        // A limit that this kernel does not know cannot be passed on.
        if let Ok((soft, hard)) = getrlimit(resource) {
            let limit = ResourceLimit { soft: bounded(soft), hard: bounded(hard) };
            limits.insert(name.into(), limit);
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_this_process_are_read() {
        let limits = own_limits();
        assert!(limits.contains_key("nofile") && limits.contains_key("core"));
    }
}
