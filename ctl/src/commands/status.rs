//! `ps` and `status`: what there is and how it stands.

use std::io;

use fermata_protocol::ProjectName;
use fermata_protocol::agent::AgentView;
use fermata_protocol::budget::Budget;
use fermata_protocol::budget::Usage;
use fermata_protocol::daemon::DaemonStatus;
use fermata_protocol::project::{AutomaticCheckpoints, LookView, ProjectDetail, ProjectList, ProjectShow, ProjectView};
use serde_json::json;

use super::{Ended, target_of};
use crate::output::{Cell, Facts, Format, Output, Paint, Table, agent_status, note, project_status};
use crate::session::Session;
use crate::units::{bytes, duration, now, number, until};

/// Runs `ps`.
pub fn ps(session: &mut Session, project: Option<ProjectName>) -> Ended {
    let agents = super::all_agents(session, project.as_ref())?;
    session.out.rows(&agents, "no agents", target_of, agent_table)?;
    note_old_samples(session, &agents);
    Ok(0)
}

/// Says how old the samples of what agents use are, where they are not of now.
fn note_old_samples(session: &Session, agents: &[AgentView]) {
    const OLD_MS: i64 = 10_000;
    let oldest = agents.iter().filter_map(|agent| Some(agent.load?.sampled_at)).min();
    if let Some(oldest) = oldest.filter(|at| session.out.is_human() && now().since(*at) > OLD_MS) {
        note(&format!("CPU and memory were sampled {}; newer samples are being taken", session.out.ago(oldest)));
    }
}

/// The table of agents.
pub fn agent_table(out: &Output, agents: &[AgentView]) -> Table {
    let headings = ["AGENT", "STATUS", ">PID", "SINCE", ">CPU", ">MEM", ">PROCS", "PROGRESS", ">TOKENS", "COMMAND"];
    let mut table = Table::new(&headings);
    for agent in agents {
        let tokens = agent.usage.input_tokens + agent.usage.output_tokens;
        table.row([
            target_of(agent).to_string().into(),
            status_cell(out, agent),
            agent.pid.map(|pid| pid.to_string()).unwrap_or_default().into(),
            since(out, agent).into(),
            agent.load.and_then(|load| load.cpu_percent).map(|cpu| format!("{cpu:.0}%")).unwrap_or_default().into(),
            agent.load.map(|load| bytes(load.memory_bytes)).unwrap_or_default().into(),
            agent.load.map(|load| load.processes.to_string()).unwrap_or_default().into(),
            progress(agent).into(),
            if tokens == 0 { String::new() } else { number(tokens) }.into(),
            Cell::painted(agent.argv.join(" "), Paint::Dim),
        ]);
    }
    table
}

fn status_cell(out: &Output, agent: &AgentView) -> Cell {
    if let Some(at) = agent.next_start_at {
        return Cell::painted(format!("{} (starts {})", agent.status, until(at, out.now())), Paint::Attention);
    }
    if !agent.waits_for.is_empty() {
        let names: Vec<&str> = agent.waits_for.iter().map(|name| name.as_str()).collect();
        return Cell::painted(format!("waits for {}", names.join(", ")), Paint::Attention);
    }
    if agent.stale_at.is_some() {
        return Cell::painted(format!("{} (stale)", agent.status), Paint::Attention);
    }
    match agent.exit {
        Some(exit) if agent.status.is_terminal() && !exit.is_success() => {
            Cell::painted(format!("{} ({exit})", agent.status), Paint::Bad)
        }
        _ if agent.suspended_at.is_some() => Cell::painted(format!("{}, suspended", agent.status), Paint::Attention),
        _ => agent_status(agent.status),
    }
}

fn since(out: &Output, agent: &AgentView) -> String {
    let at = if agent.status.is_terminal() { agent.ended_at.or(agent.started_at) } else { agent.started_at };
    at.map(|at| out.ago(at)).unwrap_or_default()
}

fn progress(agent: &AgentView) -> String {
    let Some(progress) = &agent.progress else {
        return String::new();
    };
    let percent = progress.percent.map(|percent| format!("{percent:.0}%"));
    let message = progress.message.clone();
    let left = agent.remaining_ms.map(|ms| format!("({} left)", duration(ms as f64)));
    let parts: Vec<String> = percent.into_iter().chain(message).chain(left).collect();
    parts.join(" ")
}

/// Runs `status`.
pub fn status(session: &mut Session, project: Option<ProjectName>) -> Ended {
    if let Some(project) = project {
        return show(session, project);
    }
    let daemon = session.call(&DaemonStatus {})?;
    let projects = session.call(&ProjectList {})?.projects;
    match session.out.format() {
        Format::Json => session.out.json(&json!({ "daemon": daemon, "projects": projects }))?,
        Format::Ids => {
            for project in &projects {
                session.out.line(&project.name)?;
            }
        }
        Format::Human => {
            let out = &mut session.out;
            let facts = Facts::default()
                .add(
                    "daemon",
                    format!("{}, pid {}, started {}", daemon.version, daemon.pid, out.ago(daemon.started_at)),
                )
                .add("socket", &daemon.socket)
                .add("state", &daemon.state_dir)
                .add("freezer", &daemon.freezer)
                .add("agents", format!("{} running", daemon.agents_running));
            out.facts(&facts)?;
            for line in &daemon.recovery {
                out.facts(&Facts::default().add("recovery", line))?;
            }
            if !projects.is_empty() {
                out.line("")?;
                let table = project_table(out, &projects);
                out.table(&table)?;
            }
            for project in &projects {
                if let Some(now) = &project.look {
                    out.line(format_args!("{}: looking at the workspace: {}", project.name, look(now)))?;
                }
            }
        }
    }
    Ok(0)
}

/// The table of projects.
pub fn project_table(out: &Output, projects: &[ProjectView]) -> Table {
    let mut table =
        Table::new(&["PROJECT", "STATUS", "PHASE", ">AGENTS", ">TASKS", ">QUESTIONS", ">DISK", "SINCE", "WORKSPACE"]);
    for project in projects {
        let questions = match project.open_questions {
            0 => Cell::from(""),
            open => Cell::painted(open.to_string(), Paint::Attention),
        };
        let since = match &project.pause {
            Some(pause) => format!("paused {}", out.ago(pause.paused_at)),
            None => out.ago(project.created_at),
        };
        table.row([
            Cell::from(&project.name.as_str()),
            project_status(project.status),
            project.phase.as_str().into(),
            format!("{}/{}", project.agents_running, project.agents).into(),
            tasks(project).into(),
            questions,
            project.disk_bytes.map(bytes).unwrap_or_default().into(),
            since.into(),
            Cell::painted(&project.workspace, Paint::Dim),
        ]);
    }
    table
}

/// How far a look at the workspace has come.
fn look(look: &LookView) -> String {
    let LookView { step, done, total, unit } = look;
    match total {
        0 => step.clone(),
        _ => format!("{step}, {} of {} {unit}", number(*done), number(*total)),
    }
}

fn tasks(project: &ProjectView) -> String {
    match project.tasks_total {
        0 => String::new(),
        total => format!("{}/{total}", project.tasks_completed),
    }
}

/// Runs `project show` and `status PROJECT`.
pub fn show(session: &mut Session, project: ProjectName) -> Ended {
    let detail = session.call(&ProjectShow { project })?;
    let id = Some(detail.project.name.to_string());
    session.out.one(&detail, id, detail_for_people)?;
    Ok(0)
}

/// When checkpoints are made by themselves.
fn automatic(config: &AutomaticCheckpoints) -> String {
    let AutomaticCheckpoints { every_units, every_ms, on_phase_change, before_shutdown } = *config;
    let when = [
        (every_ms > 0).then(|| format!("after {} of running", duration(every_ms as f64))),
        (every_units > 0).then(|| format!("after {} units of progress", number(every_units))),
        on_phase_change.then(|| "on a new phase".to_owned()),
        before_shutdown.then(|| "before the daemon ends".to_owned()),
    ];
    let when: Vec<String> = when.into_iter().flatten().collect();
    if when.is_empty() { "never".into() } else { when.join(", ") }
}

/// What was spent of a budget.
fn budget(budget: &Budget, spent: &Usage) -> Option<String> {
    let dollars = |micro: u64| format!("${:.2}", micro as f64 / 1e6);
    let tokens = budget.tokens.map(|bound| format!("{} of {} tokens", number(spent.tokens()), number(bound)));
    let cost = budget.cost_micro_usd.map(|bound| format!("{} of {}", dollars(spent.cost_micro_usd), dollars(bound)));
    let waived = budget.waived.then(|| "waived until it is set anew".to_owned());
    let parts: Vec<String> = tokens.into_iter().chain(cost).chain(waived).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn detail_for_people(out: &mut Output, detail: &ProjectDetail) -> io::Result<()> {
    let project = &detail.project;
    let described = Some(&project.description).filter(|d| !d.is_empty());
    let source = project.source.as_ref().map(|source| {
        let branch = source.branch.as_ref().map(|b| format!(" ({b})"));
        format!("{} {}{}", source.kind, source.location, branch.unwrap_or_default())
    });
    let pause = project.pause.as_ref().map(|pause| {
        format!(
            "{}, {} ({}), checkpoint {}{}",
            out.ago(pause.paused_at),
            pause.mode.as_str(),
            pause.mechanism.as_str(),
            pause.checkpoint_id,
            pause.reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default()
        )
    });
    let cause = project.pause.as_ref().map(|pause| pause.cause).filter(|cause| !cause.is_person());
    let budget = budget(&detail.config.budget, &project.usage);
    let restored = project.pause.as_ref().and_then(|pause| pause.restored);
    let broken = project.broken.as_ref().map(|broken| {
        format!(
            "{}; fermatactl checkpoint restore {} {} brings back what was there",
            broken.error.message, project.name, broken.safety_checkpoint_id
        )
    });
    let operation = detail.operation.as_ref().map(|op| {
        let step = op.step.as_deref().unwrap_or("");
        format!("{} {} {} {step}", op.id, op.kind.as_str(), op.state.as_str())
    });
    let last = detail.last_checkpoint.as_ref().map(|checkpoint| {
        format!(
            ", the last is {} ({}, {}, {})",
            checkpoint.id,
            checkpoint.trigger.as_str(),
            out.ago(checkpoint.created_at),
            bytes(checkpoint.size_bytes)
        )
    });
    let context = &detail.context;
    let facts = Facts::default()
        .add("project", project.name.as_str())
        .maybe("description", described)
        .add("status", project_status(project.status))
        .add("phase", project.phase.as_str())
        .add("workspace", &project.workspace)
        .maybe("source", source)
        .maybe("paused", pause)
        .maybe("paused by", cause.map(|cause| cause.as_str().replace('_', " ")))
        .maybe("budget", budget)
        .maybe("broken", broken)
        .maybe("restored", restored.map(|n| format!("checkpoint {n}; a resume starts the agents again")))
        .add("created", out.ago(project.created_at))
        .maybe("paused in all", (project.total_paused_ms > 0).then(|| duration(project.total_paused_ms as f64)))
        .maybe("operation", operation)
        .maybe("looking at the workspace", project.look.as_ref().map(look))
        .maybe("tasks", Some(tasks(project)).filter(|t| !t.is_empty()))
        .add(
            "checkpoints",
            format!(
                "{}{}{}",
                detail.checkpoints,
                project.disk_bytes.map(|disk| format!(", {} on disk", bytes(disk))).unwrap_or_default(),
                last.unwrap_or_default()
            ),
        )
        .add("saved by itself", automatic(&detail.config.automatic))
        .maybe(
            "context",
            (context.items > 0).then(|| {
                format!(
                    "{} tokens; {} hot, {} warm, {} cold, {} archived",
                    number(context.tokens),
                    context.hot,
                    context.warm,
                    context.cold,
                    context.archived
                )
            }),
        );
    out.facts(&facts)?;
    if !detail.agents.is_empty() {
        out.line("")?;
        let table = agent_table(out, &detail.agents);
        out.table(&table)?;
    }
    let details = detail.agents.iter().filter_map(|agent| {
        let detail = agent.detail.as_ref()?;
        Some(format!("{}: {detail}", target_of(agent)))
    });
    let pause = project.pause.iter().flat_map(|pause| pause.warnings.iter().cloned());
    out.warnings(&details.chain(pause).collect::<Vec<_>>())?;
    if project.open_questions > 0 {
        note(&format!("{} open question(s): fermatactl inbox {}", project.open_questions, project.name));
    }
    Ok(())
}
