//! The keys of `[agents.NAME]` that become [`Supervision`].

use fermata_protocol::AgentName;
use fermata_protocol::budget::Budget;
use fermata_protocol::supervision::{
    Dependency, DependencyState, Hook, Readiness, ReadyWhen, Resources, Restart, RestartPolicy, Supervision,
    TerminalSize,
};

use super::section::{Located, Section, path};
use super::tree::{TomlEntry, TomlNode, TomlValue};
use crate::cli::supervision::{DEPENDENCY_STATES, OUTPUT_POLICIES, RECOVERIES, RESTART_POLICIES, STALE_ACTIONS};

/// The default size of a terminal.
const TERMINAL: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// Larger budgets are taken for mistakes.
const MAX_USD: f64 = 1e9;

/// More cores than any machine has.
const MAX_CPUS: f64 = 65_536.0;

/// Reads the keys of an agent; the dependencies come with their locations, for the check of the graph.
pub fn read(agent: &mut Section<'_>) -> (Supervision, Vec<Located<Dependency>>) {
    let depends_on = dependencies(agent);
    let supervision = Supervision {
        restart: restart(agent).unwrap_or_default(),
        recover: agent.choice("recover", RECOVERIES).unwrap_or_default(),
        depends_on: depends_on.iter().map(|dependency| dependency.value.clone()).collect(),
        ready: readiness(agent),
        timeout_ms: positive(agent, "timeout"),
        stale_after_ms: stale_after(agent),
        on_stale: agent.choice("on_stale", STALE_ACTIONS).unwrap_or_default(),
        pre_start: hook(agent, "pre_start"),
        post_stop: hook(agent, "post_stop"),
        terminal: terminal(agent),
        resources: Resources {
            memory_max_bytes: agent.size("memory_max").and_then(|size| greater_than_zero(agent, "memory_max", size)),
            // In percent of one core.
            cpu_max_percent: agent.amount("cpus", MAX_CPUS).map(|cpus| (cpus * 100.0).round().max(1.0) as u64),
            pids_max: agent.count("pids_max", 1, u64::from(u32::MAX)),
        },
        budget: Budget {
            tokens: agent.count("token_budget", 1, u64::MAX),
            // In millionths, like reported usage.
            cost_micro_usd: agent.amount("cost_budget", MAX_USD).map(|usd| (usd * 1e6).round().max(1.0) as u64),
            ..Budget::default()
        },
        output: agent.choice("output", OUTPUT_POLICIES).unwrap_or_default(),
        declared: None,
    };
    (supervision, depends_on)
}

fn greater_than_zero(section: &Section<'_>, key: &str, amount: Located<u64>) -> Option<u64> {
    if amount.value == 0 {
        section.problem(&amount.span, key, format!("'{}' must be greater than zero", section.path_of(key)));
        return None;
    }
    Some(amount.value)
}

fn positive(section: &mut Section<'_>, key: &'static str) -> Option<u64> {
    let duration = section.duration(key)?;
    greater_than_zero(section, key, duration)
}

fn stale_after(agent: &mut Section<'_>) -> Option<u64> {
    let member = agent.member("stale_after")?;
    match &member.node.kind {
        TomlValue::Text(text) if text == "never" => Some(0),
        _ => positive(agent, "stale_after"),
    }
}

/// Opens an entry that is a table.
fn inner<'a>(section: &Section<'a>, key: &str, member: &'a TomlEntry) -> Option<Section<'a>> {
    Section::of(section.path_of(key), member, section.problems())
}

fn restart(agent: &mut Section<'_>) -> Option<Restart> {
    let member = agent.member("restart")?;
    if !matches!(member.node.kind, TomlValue::Table(_)) {
        let policy = agent.choice_of("restart", &member.node, RESTART_POLICIES)?;
        return Some(Restart { policy, ..Restart::default() });
    }
    let mut table = inner(agent, "restart", member)?;
    let default = Restart::default();
    let policy = table.choice("policy", RESTART_POLICIES);
    let delay = table.duration("delay");
    let max_delay = table.duration("max_delay");
    let restart = Restart {
        // A table without a policy asks for restarts.
        policy: policy.unwrap_or(RestartPolicy::OnFailure),
        delay_ms: delay.as_ref().map_or(default.delay_ms, |delay| delay.value),
        max_delay_ms: max_delay.as_ref().map_or(default.max_delay_ms, |delay| delay.value),
        limit: table.count("limit", 0, u64::from(u32::MAX)).map_or(default.limit, |n| n as u32),
        within_ms: positive(&mut table, "within").unwrap_or(default.within_ms),
    };
    if let Some(at) = max_delay.as_ref().or(delay.as_ref()).filter(|_| restart.delay_ms > restart.max_delay_ms) {
        let key = if max_delay.is_some() { "max_delay" } else { "delay" };
        table.problem(&at.span, key, "'delay' is longer than 'max_delay'");
    }
    table.finish();
    Some(restart)
}

fn dependencies(agent: &mut Section<'_>) -> Vec<Located<Dependency>> {
    let Some(member) = agent.member("depends_on") else { return Vec::new() };
    let items: Vec<&TomlNode> = match &member.node.kind {
        TomlValue::List(items) => items.iter().collect(),
        _ => vec![&member.node],
    };
    let mut found: Vec<Located<Dependency>> = items.into_iter().filter_map(|item| dependency(agent, item)).collect();
    // Sorted, since another order is not another declaration.
    found.sort_by(|a, b| a.value.agent.cmp(&b.value.agent));
    found
}

fn dependency(agent: &Section<'_>, node: &TomlNode) -> Option<Located<Dependency>> {
    let key = "depends_on";
    let name_of = |text: &str, section: &Section<'_>, node: &TomlNode, key: &str| match AgentName::new(text) {
        Ok(name) => Some(name),
        Err(error) => {
            section.problem(&node.span, key, error.to_string());
            None
        }
    };
    match &node.kind {
        TomlValue::Text(text) => {
            let name = name_of(text, agent, node, key)?;
            let value = Dependency { agent: name, until: DependencyState::default() };
            Some(Located { value, span: node.span.clone() })
        }
        TomlValue::Table(table) => {
            let mut section = Section::new(agent.path_of(key), node.span.clone(), table, agent.problems());
            let target = section.text("agent");
            let until = section.choice("until", DEPENDENCY_STATES).unwrap_or_default();
            if section.members().get("agent").is_none() {
                section.problem(&node.span, "agent", format!("'{}' names no agent", section.path_of("agent")));
            }
            let name = target.and_then(|target| {
                let node = TomlNode { span: target.span, kind: TomlValue::Text(target.value.clone()) };
                Some(Located { value: name_of(&target.value, &section, &node, "agent")?, span: node.span })
            });
            section.finish();
            let name = name?;
            Some(Located { value: Dependency { agent: name.value, until }, span: name.span })
        }
        other => {
            let message = format!(
                "'{}' must be agent names, or tables such as {{ agent = \"db\", until = \"completed\" }}, not {}",
                agent.path_of(key),
                other.name()
            );
            agent.problem(&node.span, key, message);
            None
        }
    }
}

fn readiness(agent: &mut Section<'_>) -> Option<Readiness> {
    let member = agent.member("ready")?;
    let mut table = inner(agent, "ready", member)?;
    let reported = table.member("reported").map(|member| member.key.clone());
    let reported_flag = table.flag("reported");
    let output = table.text("output");
    let command = table.command("command");
    let timeout_ms = positive(&mut table, "timeout");
    let given: Vec<&str> =
        ["reported", "output", "command"].into_iter().filter(|key| table.members().contains_key(*key)).collect();
    if given.len() != 1 {
        let message = match &given[..] {
            [] => format!("'{}' has no condition", agent.path_of("ready")),
            several => format!("'{}' has {}; only one is allowed", agent.path_of("ready"), several.join(" and ")),
        };
        let hint = "write one of reported = true, output = \"TEXT\" or command = \"COMMAND\"";
        agent.problem_with_hint(&member.key, "ready", message, hint);
    }
    if let (Some(span), Some(false)) = (reported, reported_flag) {
        table.problem_with_hint(
            &span,
            "reported",
            "'reported' can only be true",
            "omit 'ready': the agent is then ready as soon as it runs",
        );
    }
    table.finish();
    let when = match (reported_flag, output, command) {
        (Some(true), _, _) => ReadyWhen::Reported,
        (_, Some(output), _) => ReadyWhen::Output(output.value),
        (_, _, Some(command)) => ReadyWhen::Command(command),
        _ => return None,
    };
    Some(Readiness { when, timeout_ms })
}

fn hook(agent: &mut Section<'_>, key: &'static str) -> Option<Hook> {
    let member = agent.member(key)?;
    if !matches!(member.node.kind, TomlValue::Table(_)) {
        return Some(Hook { argv: agent.command_of(key, &member.node)?, timeout_ms: None });
    }
    let mut table = inner(agent, key, member)?;
    let argv = table.command("command");
    let timeout_ms = positive(&mut table, "timeout");
    if !table.members().contains_key("command") {
        agent.problem(&member.key, key, format!("'{}' has no 'command'", agent.path_of(key)));
    }
    table.finish();
    Some(Hook { argv: argv?, timeout_ms })
}

fn terminal(agent: &mut Section<'_>) -> Option<TerminalSize> {
    let member = agent.member("tty")?;
    if !matches!(member.node.kind, TomlValue::Table(_)) {
        return agent.flag("tty")?.then_some(TERMINAL);
    }
    let mut table = inner(agent, "tty", member)?;
    let most = u64::from(u16::MAX);
    let size = TerminalSize {
        rows: table.count("rows", 1, most).map_or(TERMINAL.rows, |n| n as u16),
        cols: table.count("cols", 1, most).map_or(TERMINAL.cols, |n| n as u16),
    };
    table.finish();
    Some(size)
}

/// Returns the path of the table of an agent.
pub fn table_of(agent: &str) -> String {
    path("agents", agent)
}
